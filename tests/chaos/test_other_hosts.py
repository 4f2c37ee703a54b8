"""Owners that sleep and hosts that share nothing but a store (make chaos: the first takes the lease's half minute)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import ONE, assert_each_sample_once
from runs import environment, rows, run, start, traced

from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import open_storage


@pytest.mark.chaos
def test_a_job_that_wakes_up_after_its_successor_writes_nothing_and_ends(alone: Path) -> None:
    options = (*ONE, "run.name=zombie", "trainer.duration=600step", "checkpoint.every=50step")
    place = alone / "runs" / "zombie"
    zombie = start(alone, 1, *options)
    try:
        while not list(place.glob("checkpoints/step-*")):
            assert zombie.poll() is None, zombie.communicate()
            time.sleep(0.02)
        os.kill(zombie.pid, signal.SIGSTOP)
        # It looks like one on another machine, whose processes can't be asked.
        lease = max((place / ".lease").glob("*.json"))
        lease.write_text(json.dumps({**json.loads(lease.read_text()), "machine": "elsewhere", "host": "elsewhere"}))
        done = run(alone, 1, *options)
        assert "took the run over from" in done.stdout
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "logs" not in path.parts}
        os.kill(zombie.pid, signal.SIGCONT)
        out, err = zombie.communicate(timeout=180)
    finally:
        zombie.kill()
    assert zombie.returncode == 1, out
    assert "has had another owner since" in err
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and "logs" not in path.parts}
    changed = {path.relative_to(place).as_posix() for path in {*before, *after} if before.get(path) != after.get(path)}
    assert changed <= {"trace/attempt-0-rank-0.jsonl"}, "only its own trace"
    steps = [row["step"] for row in rows(place, "train")]
    assert steps == sorted(set(steps))
    assert {row.state for row in CheckpointStore(open_storage(place / "checkpoints")).verify_all()} == {"good"}


@pytest.mark.chaos
def test_two_hosts_that_share_only_a_store_leave_one_whole_record(alone: Path, s3_port: int, tmp_path: Path) -> None:
    url = "s3://bucket/hosts"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def job(*more: str) -> None:
        nodes = []
        for node in range(2):
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
            command += [
                "--nproc-per-node=1",
                "--master-addr=127.0.0.1",
                f"--master-port={port}",
                "--local-addr=127.0.0.1",
            ]
            command += ["-m", "dist_train.main", *ONE, f"run.dir={url}", "run.name=pair", *more]
            env = environment(XDG_CACHE_HOME=str(tmp_path / f"host{node}"))
            nodes.append(subprocess.Popen(command, cwd=alone, env=env, text=True, stderr=subprocess.PIPE))
        for process in nodes:
            _, err = process.communicate(timeout=180)
            assert process.returncode == 0, err

    job("trainer.stop_at=10step")
    job()
    storage, there = open_storage(f"{url}/pair"), tmp_path / "there"
    storage.fs.get(f"{url}/pair", str(there), recursive=True)  # type: ignore[attr-defined]
    assert_each_sample_once(there)
    assert len(list((there / "trace").glob("*-rank-1.jsonl"))) == 2
    assert [row["step"] for row in rows(there, "train")] == [5, 10, 15, 20, 24]
    assert set(traced(there)) == set(range(1, 25))
    for rank in range(2):
        assert (there / "logs" / f"rank-{rank}.log").read_text()
        assert not list((tmp_path / f"host{1 - rank}").rglob(f"rank-{rank}.log")), "the hosts are to share nothing"
