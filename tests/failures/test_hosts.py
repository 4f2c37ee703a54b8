"""Hosts that die, lose their network (the others learn of it within seconds, and say which) or share no directory."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing import CONFIG
from hosts import Hosts, missing


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Three hosts, or as many as `request` says, with a user's project."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    shutil.copy(Path(__file__).parent / "faulty.py", tmp_path)
    (tmp_path / "faulty.yaml").write_text(CONFIG)
    hosts = Hosts(getattr(request, "param", 3), tmp_path)
    yield hosts
    hosts.close()


@pytest.mark.parametrize("hosts", [2], indirect=True)
def test_a_run_directory_that_the_hosts_do_not_share_is_refused(hosts: Hosts) -> None:
    (hosts.folder / "runs").mkdir()
    command = [sys.executable, "-m", "dist_train.main", "--config", "faulty.yaml"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "h1", "MASTER_PORT": "29400"}
    first = hosts.run(1, *command, **place, RANK="0")
    second = hosts.run(2, *command, before="mount -t tmpfs tmpfs runs", **place, RANK="1")
    (out, reported), (_, silent) = [job.communicate(timeout=240) for job in (first, second)]
    assert (first.returncode, second.returncode) == (2, 2), out + reported + silent
    message = "is not the same directory on all nodes: h2 can't see a file that h1 (rank 0) wrote there"
    assert message in " ".join((reported + silent).split())
    assert not [path for path in (hosts.folder / "runs").rglob("*") if path.is_file()]


@pytest.mark.chaos
@pytest.mark.parametrize("way", ["crash", "cut"])
def test_a_host_that_dies_is_named_and_the_others_end_their_ranks(hosts: Hosts, way: str) -> None:
    """The rank of h3 stands still at step 13 first, so that nothing else ends the run."""
    fails = {3: "hang-model@any"}
    jobs = [hosts.torchrun(i, "--config", "faulty.yaml", FAIL=fails.get(i, "none@0")) for i in (1, 2, 3)]
    deadline = time.monotonic() + 60
    while not (hosts.folder / "happened").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    began = time.monotonic()
    if way == "cut":
        hosts.cut(3)
    else:
        for pid in hosts.pids(3):
            os.kill(pid, signal.SIGKILL)
    # Agents wait a minute and more for a rendezvous with a host that is gone: it is the ranks that must be gone.
    while len(hosts.pids(1)) > 1 or len(hosts.pids(2)) > 1:
        assert time.monotonic() < began + 20, [hosts.pids(i) for i in (1, 2)]
        time.sleep(0.1)
    seconds = time.monotonic() - began
    for i in (1, 2):
        for pid in hosts.pids(i):
            os.kill(pid, signal.SIGKILL)
    reported = "".join("".join(job.communicate(timeout=180)) for job in jobs[:2])
    print(reported, f"{way}: gone after {seconds:.1f} s")
    lines = [line for line in reported.splitlines() if line.startswith("dist_train: ")]
    assert len(lines) == 1
    assert re.fullmatch(r"dist_train: rank \d of 3 on h3 was lost in step 13 \(forward\)", lines[0])
    assert seconds < 10
    assert "no heartbeat for 6 s" in reported
