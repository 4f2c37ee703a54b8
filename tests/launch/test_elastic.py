"""launch/elastic.sh on hosts in network namespaces: hosts crash, join and are cut off, and the run completes by itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bitwise_runs import other_bits
from hosts import Hosts, missing
from runs import CONFIGS, environment, forks_workers, run, traced
from slurm_cluster import free_ports, wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40 * 20  # epochs of 1,257 samples by 64
CONFIG = f"""
extends: {CONFIGS / "digits_mlp.yaml"}
run: {{name: elastic}}
data: {{drop_last: false}}
trainer: {{duration: 40ep, log_every: 5step}}
callbacks: [{{_target_: pace.Pace}}]
checkpoint: {{every: 10step}}
tracking: {{tensorboard: false, report: false}}
debug: {{trace_samples: true}}
"""
# Four micro-batches a step, three in an epoch's last; several buckets.
BITWISE = CONFIG.replace("duration:", "micro_batch_size: 16, duration:") + (
    "distributed: {reproducibility: bitwise, bucket_mb: 0.01}\n"
)


def ledger(place: Path) -> list[dict[str, Any]]:
    """The starts and ends of a run."""
    path = place / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Cluster(Hosts):
    """Hosts that train one run with a script of launch/, and that run's records."""

    def __init__(self, count: int, folder: Path, script: str):
        super().__init__(count, folder)
        self.script = str(ROOT / "launch" / script)
        self.jobs: dict[int, subprocess.Popen[str]] = {}
        self.crashed: set[int] = set()
        self.place = folder / "runs" / "elastic"

    def join(self, *hosts: int, **env: str) -> None:
        """Start the script on these hosts."""
        self.crashed -= set(hosts)
        for i in hosts:
            output = f"{self.folder}/output-{i}.txt"
            self.jobs[i] = self.run(
                i, self.script, "elastic.yaml", before=f"exec >>{output} 2>&1",
                NNODES=f"1:{self.count}", NPROC_PER_NODE="1", PET_SHUTDOWN_TIMEOUT="20", **forks_workers(), **env,
            )  # fmt: skip

    def crash(self, i: int) -> None:
        """Kill all processes of host i at once."""
        self.crashed.add(i)
        super().crash(i)

    def starts(self) -> list[dict[str, Any]]:
        """The starts in attempts.jsonl."""
        return [line for line in ledger(self.place) if line["event"] == "start"]

    def until(self, what: str, size: int, timeout: float = 200) -> float:
        """Wait until a newer start on `size` hosts has trained; return the seconds that it took."""
        before, began = len(self.starts()), time.monotonic()
        rows = self.place / "metrics.jsonl"

        def trains() -> bool:
            ended = [i for i, job in self.jobs.items() if job.poll() is not None and i not in self.crashed]
            assert not ended, f"{what}: h{ended} ended\n{self.output()}"
            assert time.monotonic() < began + timeout, f"{what}: not within {timeout:.0f} s\n{self.output()}"
            starts = self.starts()
            if len(starts) <= before or starts[-1]["world_size"] != size or not rows.exists():
                return False
            last = [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")][-1:]
            return bool(last) and last[0]["step"] >= starts[-1]["resumed_from"] + 5

        while not trains():
            time.sleep(0.2)
        seconds = time.monotonic() - began
        print(f"{what}: {seconds:.0f} s")
        return seconds

    def meeting(self) -> int:
        """The current rendezvous host."""
        rounds = self.place / ".meetings"
        newest = max(int(name) for name in os.listdir(rounds) if name.isdigit())
        return int((rounds / str(newest)).read_text()[1])

    def ends(self, i: int) -> int:
        """How many times torchrun has ended on host i."""
        return (self.folder / f"output-{i}.txt").read_text().count(": again: ")

    def output(self) -> str:
        """The output of the hosts."""
        texts = [path.read_text() for path in sorted(self.folder.glob("output-*.txt"))]
        return "\n\n".join("\n".join(text.splitlines()[-60:]) for text in texts)

    def assert_finishes(self, *hosts: int) -> None:
        """Let the run complete, and check that no step was trained twice or lost."""
        (self.folder / "hurry").touch()
        assert [self.jobs[i].wait(200) for i in hosts] == [0 for _ in hosts], self.output()
        assert json.loads((self.place / "status.json").read_text())["state"] == "completed"
        numbers = [line["attempt"] for line in ledger(self.place)]
        assert numbers == sorted(numbers), "a host that was cut off has written over its successors' records"
        steps = traced(self.place)
        assert sorted(steps) == list(range(1, STEPS + 1))
        for first in range(1, STEPS + 1, 20):
            epoch = [steps[step] for step in range(first, first + 20)]
            assert sum(map(len, epoch)) == 1257
            assert len(set().union(*epoch)) == 1257


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the config and its callback."""
    (tmp_path / "elastic.yaml").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "programs" / "pace.py", tmp_path)
    return tmp_path


@pytest.fixture
def cluster(project: Path) -> Iterator[Callable[..., Cluster]]:
    """A function that makes a cluster with a number of hosts."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    made: list[Cluster] = []

    def make(count: int, script: str = "elastic.sh") -> Cluster:
        made.append(Cluster(count, project, script))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_the_run_completes_without_a_host_that_crashed(cluster: Callable[..., Cluster]) -> None:
    hosts = cluster(2)
    hosts.join(1, RDZV_CONF="last_call_timeout=4")
    wait_for("the first host's round", (hosts.place / ".meetings" / "1").exists, 60)
    hosts.join(2, RDZV_CONF="last_call_timeout=4")
    hosts.until("two hosts start", 2)
    hosts.crash(2)
    hosts.until("a host crashes", 1)
    hosts.assert_finishes(1)


@pytest.mark.chaos
def test_three_hosts_crash_join_and_leave_and_the_run_completes(cluster: Callable[..., Cluster]) -> None:
    hosts = cluster(3)
    hosts.join(1, 2)
    hosts.until("two hosts start", 2)
    hosts.join(3)
    hosts.until("a host joins", 3)
    hosts.crash(3)
    hosts.until("a host crashes", 2)
    hosts.join(3)
    hosts.until("it comes back", 3)
    where = hosts.meeting()
    hosts.crash(where)
    hosts.until("the host at which all meet crashes", 2)
    hosts.join(where)
    hosts.until("it comes back", 3)
    hosts.jobs[2].terminate()
    assert hosts.jobs[2].wait(120) == 75, hosts.output()
    hosts.crashed.add(2)
    hosts.until("a host leaves", 2)
    hosts.assert_finishes(1, 3)


@pytest.mark.chaos
@pytest.mark.parametrize(("first", "whose"), [(1, "another host's"), (1, "rank 0's"), (2, "that of the first host")])
def test_a_host_is_cut_off_and_reconnected_and_the_run_completes(
    cluster: Callable[..., Cluster], first: int, whose: str
) -> None:
    """The rendezvous is at the first host, and torchrun gives rank 0 to h1: when it is cut off, its ranks end first."""
    hosts = cluster(3)
    hosts.join(first)
    wait_for("the first host's round", (hosts.place / ".meetings" / "1").exists, 60)
    hosts.join(*{1, 2, 3} - {first})
    hosts.until("three hosts start", 3)
    assert hosts.meeting() == first
    where = 2 if "another" in whose else first
    ends = hosts.ends(where)
    hosts.cut(where)
    hosts.until(f"a cable is cut, {whose}", 2)
    wait_for("the host without a cable has given its round up", lambda: hosts.ends(where) > ends, 120)
    hosts.heal(where)
    hosts.until("it is plugged in", 3)
    hosts.assert_finishes(1, 2, 3)


@pytest.mark.chaos
def test_torchrun_alone_continues_without_a_host_and_readmits_it(cluster: Callable[..., Cluster]) -> None:
    """Any host except the rendezvous host."""
    hosts = cluster(3, "torchrun.sh")
    hosts.join(1, 2, 3, RDZV_ENDPOINT="h1")
    hosts.until("three hosts start", 3)
    hosts.crash(3)
    hosts.until("a host crashes", 2)
    hosts.join(3, RDZV_ENDPOINT="h1")
    hosts.until("it comes back", 3)
    hosts.cut(2)
    hosts.crashed.add(2)
    hosts.until("a cable is cut", 2)
    hosts.assert_finishes(1, 3)


@pytest.mark.chaos
def test_hosts_leave_and_join_a_bitwise_run_and_its_bits_are_those_of_one_process(
    project: Path, cluster: Callable[..., Cluster]
) -> None:
    """torchrun --nnodes=1:3; the hosts share no sockets, so that all messages go through torch.distributed."""
    (project / "elastic.yaml").write_text(BITWISE)
    hosts = cluster(3, "torchrun.sh")
    elastic = {"RDZV_ENDPOINT": "h1", "RDZV_CONF": "last_call_timeout=4"}
    hosts.join(1, 2, **elastic)
    hosts.until("two hosts start", 2)
    hosts.join(3, **elastic)
    hosts.until("a host joins", 3)
    hosts.crash(2)
    hosts.until("a host crashes", 2)
    hosts.crash(3)
    hosts.until("another one crashes", 1)
    hosts.join(2, 3, **elastic)
    hosts.until("both come back", 3)
    hosts.assert_finishes(1, 2, 3)
    run(project, 1, "--config", "elastic.yaml", "run.name=whole")
    assert other_bits(project / "runs" / "whole", hosts.place) == []


def script(project: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """elastic.sh on this machine alone."""
    alone = {"NNODES": "1:2", "NPROC_PER_NODE": "1", "HOST": "127.0.0.1", "RDZV_CONF": "last_call_timeout=1"}
    command = [str(ROOT / "launch" / "elastic.sh"), "elastic.yaml", "run.name=alone", *arguments]
    environ = environment(**alone, **forks_workers(), RDZV_ID=f"test-{free_ports(1)}", **env)
    return subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, timeout=300)


@pytest.mark.chaos
def test_a_crash_without_progress_is_retried_max_crashes_times_and_then_the_cause_is_reported(project: Path) -> None:
    (project / "crash").touch()
    done = script(project, MAX_CRASHES="1")
    assert done.returncode == 1, done.stdout + done.stderr
    starts = [line["resumed_from"] for line in ledger(project / "runs" / "alone") if line["event"] == "start"]
    assert starts == [0, 0]
    assert "round 2: stop: failed at step 1 (rank 0 on " in done.stdout.splitlines()[-1]
    assert "ValueError: planted crash" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [("optimiser={}", "did you mean"), ("data.global_batch_size=3000", "data.train has 1257 samples")],
)
def test_a_config_error_is_tried_once(project: Path, override: str, message: str) -> None:
    done = script(project, override, "data.drop_last=true")
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert not (project / "runs" / "alone" / ".meetings" / "2").exists()
    assert not ledger(project / "runs" / "alone")


@pytest.mark.chaos
def test_a_stop_file_ends_all_rounds(project: Path) -> None:
    place = project / "runs" / "alone"
    stopper = threading.Thread(
        target=lambda: (wait_for("rows", (place / "metrics.jsonl").exists, 120), (place / "STOP").touch())
    )
    stopper.start()
    done = script(project)
    stopper.join()
    assert done.returncode == 75, done.stdout + done.stderr
    assert json.loads((place / "status.json").read_text())["state"] == "preempted"
    assert "rest: stopped on request at step" in done.stdout.splitlines()[-1]
