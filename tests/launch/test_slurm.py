"""The batch scripts on a real Slurm with two nodes: complete, stop, resume, and give up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import SlurmCluster, wait_for

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "slurm" / "train.sbatch")
ACCELERATE = str(ROOT / "launch" / "slurm" / "accelerate.sbatch")
ONE, TWO = {"NPROC_PER_NODE": "1"}, {"NPROC_PER_NODE": "2"}
SLOW = "callbacks=[{_target_: planted.Slow}]"
CRASH = "callbacks=[{_target_: planted.Crash}]"
LENGTH = "trainer.duration=12ep"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def ledger(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def output(work: Path, job: str) -> str:
    return (work / f"dist_train-{job}.out").read_text()


def wait_until_it_trains(run: Path) -> None:
    rows = run / "metrics.jsonl"
    wait_for(f"{run.name} trains", lambda: rows.exists() and len(rows.read_text().splitlines()) >= 3, 120)


@dataclass(frozen=True)
class Submitted:
    """A job, and the directory that it was submitted in."""

    work: Path
    job: str


# Those that need nobody: options of sbatch, arguments of the script, variables.
ALONE: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]] = {
    # With all that a run writes by default.
    "uninterrupted": (("--nodes=2",), (LENGTH, "tracking.tensorboard=true", "tracking.report=true"), TWO),
    "crash": (("--nodes=1",), (LENGTH, CRASH, "checkpoint.every=6ep", "checkpoint.keep_best=null"), {**ONE, "MAX_CRASHES": "1"}),
    "optimiser={}": (("--nodes=1",), ("optimiser={}",), ONE),
    "data.global_batch_size=3000": (("--nodes=1",), ("data.global_batch_size=3000",), ONE),
    "array": (("--array=3-4",), ("trainer.duration=2ep", "run.name=task-%a", "seed=%a"), ONE),
}  # fmt: skip


@pytest.fixture(scope="module")
def submitted(slurm: SlurmCluster, make_work: Callable[[], Path]) -> dict[str, Submitted]:
    """All of `ALONE`, which run side by side: most of a job's time is waiting for the cluster."""
    found = {}
    for name, (options, arguments, env) in ALONE.items():
        work = make_work()
        found[name] = Submitted(work, slurm.submit(work, *options, TRAIN, "mlp.yaml", *arguments, env=env))
    return found


@pytest.fixture(scope="module")
def uninterrupted(slurm: SlurmCluster, submitted: dict[str, Submitted]) -> dict[str, Any]:
    """The result of a job on two nodes of two processes that nobody stopped."""
    work, job = submitted["uninterrupted"].work, submitted["uninterrupted"].job
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(work, job)
    for node in ("0-node1", "1-node2"):
        assert (work / "logs" / f"slurm-{job}" / f"node-{node}.log").exists()
    result: dict[str, Any] = read(work / "runs" / "digits_mlp" / "result.json")
    return result


def test_the_warning_before_the_time_limit_saves_requeues_and_resumes_bitwise_identically(
    slurm: SlurmCluster, work: Path, submitted: dict[str, Submitted], request: pytest.FixtureRequest
) -> None:
    """Beside the jobs of `submitted`, of which one is what it must equal."""
    run = work / "runs" / "digits_mlp"
    job = slurm.submit(work, "--nodes=2", TRAIN, "mlp.yaml", LENGTH, SLOW, env=TWO)
    wait_until_it_trains(run)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@120 sends
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(work, job)
    first, second = ledger(run, "start")
    assert 0 < second["resumed_from"] == ledger(run, "end")[0]["step"] < 12 * 19
    assert first["world_size"] == second["world_size"] == 4
    assert [line["state"] for line in ledger(run, "end")] == ["preempted", "completed"]
    uninterrupted = request.getfixturevalue("uninterrupted")
    assert read(run / "result.json")["weights_sha256"] == uninterrupted["weights_sha256"]
    assert not (run / "STOP").exists()


def test_a_job_on_two_nodes_of_two_processes_completes(uninterrupted: dict[str, Any]) -> None:
    assert uninterrupted["state"] == "completed"
    assert uninterrupted["world_size"] == 4
    assert uninterrupted["step"] == 12 * 19


@pytest.mark.chaos
def test_a_warning_before_training_has_begun_ends_the_start_and_requeues(slurm: SlurmCluster, work: Path) -> None:
    """While a dataset that takes long to build is being built, at the first start."""
    run = work / "runs" / "digits_mlp"
    data = "data.train={_target_: planted.LongToBuild, split: train}"
    job = slurm.submit(work, "--nodes=2", TRAIN, "mlp.yaml", "trainer.duration=1ep", data, env=ONE)
    wait_for("building", (work / "building").exists, 120)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output(work, job)
    assert "requeue: ended before training began" in output(work, job)
    assert len(ledger(run, "start")) == 1
    assert read(run / "status.json")["state"] == "completed"


@pytest.mark.chaos
def test_a_canceled_job_has_saved_and_resumes_on_a_different_number_of_nodes(slurm: SlurmCluster, work: Path) -> None:
    run = work / "runs" / "digits_mlp"
    job = slurm.submit(work, "--nodes=2", TRAIN, "mlp.yaml", LENGTH, SLOW, env=ONE)
    wait_until_it_trains(run)
    slurm.run("scancel", job)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    wait_for("the canceled job's last line", lambda: "rest: stopped on request" in output(work, job), 60)
    assert read(run / "status.json")["state"] == "preempted"
    assert slurm.job(job)["Restarts"] == "0"

    job = slurm.submit(work, "--nodes=1", TRAIN, "mlp.yaml", LENGTH, SLOW, env=ONE)
    assert slurm.wait(job)["JobState"] == "COMPLETED", output(work, job)
    starts = ledger(run, "start")
    assert [line["world_size"] for line in starts] == [2, 1]
    assert starts[1]["resumed_from"] == ledger(run, "end")[0]["step"]


@pytest.mark.chaos
def test_a_stop_file_ends_a_job_without_a_requeue(slurm: SlurmCluster, work: Path) -> None:
    run = work / "runs" / "digits_mlp"
    job = slurm.submit(work, "--nodes=1", TRAIN, "mlp.yaml", LENGTH, SLOW, env=ONE)
    wait_until_it_trains(run)
    (run / "STOP").touch()
    ended = slurm.wait(job)
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "0"), output(work, job)
    assert read(run / "status.json")["state"] == "preempted"


def test_a_crash_is_requeued_max_crashes_times_and_then_stops_with_the_cause(
    slurm: SlurmCluster, submitted: dict[str, Submitted]
) -> None:
    work, job = submitted["crash"].work, submitted["crash"].job
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), output(work, job)
    run = work / "runs" / "digits_mlp"
    assert [line["resumed_from"] for line in ledger(run, "start")] == [0, 0]
    assert read(run / "status.json")["state"] == "failed"
    assert "ValueError: planted crash" in output(work, job)
    assert "MAX_CRASHES=1" in output(work, job).splitlines()[-1]


@pytest.mark.parametrize("override", ["optimiser={}", "data.global_batch_size=3000"])
def test_a_config_error_is_never_requeued(slurm: SlurmCluster, submitted: dict[str, Submitted], override: str) -> None:
    work, job = submitted[override].work, submitted[override].job
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), output(work, job)
    assert override.split("=")[0] in output(work, job)
    assert not (work / "runs").exists()


def test_the_tasks_of_a_job_array_train_separate_runs(slurm: SlurmCluster, submitted: dict[str, Submitted]) -> None:
    work, job = submitted["array"].work, submitted["array"].job
    for task in (3, 4):
        assert slurm.wait(f"{job}_{task}")["JobState"] == "COMPLETED"
    digests = {read(work / "runs" / f"task-{task}" / "result.json")["weights_sha256"] for task in (3, 4)}
    assert len(digests) == 2
    assert {path.name for path in (work / "logs").iterdir()} == {f"slurm-{job}_3", f"slurm-{job}_4"}


@pytest.mark.chaos
def test_a_requeued_job_whose_run_is_completed_does_no_work(slurm: SlurmCluster, work: Path) -> None:
    job = slurm.submit(work, "--nodes=1", TRAIN, "mlp.yaml", "trainer.duration=1ep", env=ONE)
    assert slurm.wait(job)["JobState"] == "COMPLETED", output(work, job)
    slurm.run("scontrol", "requeue", job)
    wait_for("the requeued job's word", lambda: "completed before this job was requeued" in output(work, job), 60)
    assert slurm.wait(job)["ExitCode"] == "0:0"
    assert len(ledger(work / "runs" / "digits_mlp", "start")) == 1


@pytest.mark.chaos
def test_accelerate_on_two_nodes_is_bitwise_identical_to_torchrun(
    slurm: SlurmCluster, work: Path, uninterrupted: dict[str, Any]
) -> None:
    job = slurm.submit(work, "--nodes=2", ACCELERATE, "mlp.yaml", LENGTH, env=TWO)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), output(work, job)
    run = work / "runs" / "digits_mlp"
    assert [line["launcher"] for line in ledger(run, "start")] == ["accelerate"]
    assert read(run / "result.json")["weights_sha256"] == uninterrupted["weights_sha256"]


@pytest.mark.chaos
def test_a_bare_srun_needs_no_launcher(slurm: SlurmCluster, work: Path) -> None:
    """With MASTER_ADDR, because the names of these nodes aren't hostnames."""
    command = "MASTER_ADDR=127.0.0.1 srun python -m dist_train.main --config mlp.yaml trainer.duration=1ep"
    options = ("--nodes=2", "--ntasks-per-node=2", "--job-name=dist_train", "--output=%x-%j.out")
    job = slurm.submit(work, *options, f"--wrap={command}")
    assert slurm.wait(job)["JobState"] == "COMPLETED", output(work, job)
    [start] = ledger(work / "runs" / "digits_mlp", "start")
    assert (start["launcher"], start["world_size"], start["nodes"]) == ("srun", 4, 2)


@pytest.mark.chaos
def test_a_real_time_limit_passes_twice_and_the_run_completes(slurm: SlurmCluster, work: Path) -> None:
    arguments = ("--time=2", "--signal=B:USR1@30", "--nodes=1", TRAIN, "mlp.yaml", "trainer.duration=150s")
    job = slurm.submit(work, *arguments, env=TWO)
    ended = slurm.wait(job, 600)
    assert ended["JobState"] == "COMPLETED", output(work, job)
    assert int(ended["Restarts"]) >= 2
    states = [line["state"] for line in ledger(work / "runs" / "digits_mlp", "end")]
    assert states == ["preempted"] * int(ended["Restarts"]) + ["completed"]


def test_the_scripts_request_nothing_that_a_cluster_may_not_have() -> None:
    foreign = ("gpu", "gres", "mem", "partition", "account")
    lines = [line for script in (TRAIN, ACCELERATE) for line in Path(script).read_text().splitlines()]
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert len(directives) > 6
    assert not [line for line in directives if any(word in line for word in foreign)]
