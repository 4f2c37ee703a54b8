"""launch/torchrun.sh and launch/accelerate.sh on this machine, and checks of every shell script of the project."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import forks_workers
from slurm_cluster import free_ports, wait_for

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN, ACCELERATE = ROOT / "launch" / "torchrun.sh", ROOT / "launch" / "accelerate.sh"
SCRIPTS = [
    *sorted((ROOT / "launch").glob("**/*.sh")),
    *sorted((ROOT / "launch").glob("**/*.sbatch")),
    *(ROOT / name for name in (".ci/run", "bench/run")),
]


def start(work: Path, *command: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    with (work / "output.txt").open("a") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=work,
            env={**os.environ, **forks_workers(), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def run(work: Path, *command: object, env: Mapping[str, str] | None = None) -> str:
    """Run successfully; return the output."""
    code = start(work, *command, env=env).wait(180)
    text = (work / "output.txt").read_text()
    assert code == 0, text
    return text


def result(work: Path) -> dict[str, Any]:
    [path] = (work / "runs").glob("*/result.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def starts(work: Path) -> list[dict[str, Any]]:
    [path] = (work / "runs").glob("*/attempts.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == "start"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shell_script_parses_and_shellcheck_finds_nothing(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck isn't installed (Debian: shellcheck)")
    checked = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.chaos
def test_torchrun_sh_trains_on_two_processes_without_gpus(work: Path) -> None:
    run(work, TORCHRUN, "mlp.yaml", "trainer.duration=1ep")
    assert result(work)["world_size"] == 2


def test_torchrun_sh_saves_on_sigusr1_and_the_same_command_resumes(work: Path) -> None:
    command = (TORCHRUN, "mlp.yaml", "trainer.duration=4ep", "callbacks=[{_target_: planted.Slow}]")
    process = start(work, *command)
    rows = work / "runs" / "digits_mlp" / "metrics.jsonl"
    wait_for("training", rows.exists, 120)
    process.send_signal(signal.SIGUSR1)  # the script's pid is torchrun's: exec
    process.wait(120)
    status = json.loads((work / "runs" / "digits_mlp" / "status.json").read_text())
    assert status["state"] == "preempted"
    run(work, *command)
    assert starts(work)[1]["resumed_from"] == status["step"]
    assert result(work)["step"] == 4 * 19


@pytest.mark.chaos
def test_two_nodes_of_torchrun_sh_rendezvous_at_the_port_derived_from_the_job_id(work: Path) -> None:
    env = {"NNODES": "2", "RDZV_ENDPOINT": "127.0.0.1", "RDZV_ID": f"test-{free_ports(1)}", "NPROC_PER_NODE": "1"}
    nodes = [start(work, TORCHRUN, "mlp.yaml", "trainer.duration=1ep", env=env) for _ in range(2)]
    assert [node.wait(180) for node in nodes] == [0, 0], (work / "output.txt").read_text()
    assert [line["world_size"] for line in starts(work)] == [2]


@pytest.mark.chaos
def test_a_node_joins_an_elastic_job_and_the_run_resumes(work: Path) -> None:
    env = {"NNODES": "1:2", "RDZV_ENDPOINT": f"127.0.0.1:{free_ports(1)}", "NPROC_PER_NODE": "1"}
    env["RDZV_CONF"] = "last_call_timeout=2"
    command = (TORCHRUN, "mlp.yaml", "trainer.duration=40ep", "callbacks=[{_target_: planted.Slow}]")
    first = start(work, *command, env=env)
    rows = work / "runs" / "digits_mlp" / "metrics.jsonl"
    wait_for("training on one node", lambda: rows.exists() and len(rows.read_text().splitlines()) > 3, 120)
    second = start(work, *command, env=env)
    ledger = work / "runs" / "digits_mlp" / "attempts.jsonl"
    wait_for("training on two nodes", lambda: '"world_size": 2' in ledger.read_text(), 120)
    assert first.wait(180) == 0, (work / "output.txt").read_text()
    second.wait(60)
    assert [line["world_size"] for line in starts(work)] == [1, 2]
    assert starts(work)[1]["resumed_from"] > 0
    assert result(work)["step"] == 40 * 19


def test_torchrun_sh_without_an_endpoint_reports_what_is_missing(work: Path) -> None:
    done = subprocess.run([TORCHRUN], env={**os.environ, "NNODES": "2"}, cwd=work, capture_output=True, text=True)
    assert done.returncode != 0
    assert "RDZV_ENDPOINT: set it to host[:port]" in done.stderr


def test_accelerate_sh_trains_and_takes_the_precision_from_accelerates_config(work: Path) -> None:
    """On two processes; on one it is in tests/training/test_user_code.py and among the README's commands."""
    config = ROOT / "launch" / "accelerate" / "bf16.yaml"
    env = {"NPROC_PER_NODE": "2", "ACCELERATE_CONFIG": str(config)}
    text = run(work, ACCELERATE, "mlp.yaml", "trainer.duration=1ep", env=env)
    assert result(work)["world_size"] == 2
    assert [line.split()[1] for line in text.splitlines() if line.strip().startswith("precision")] == ["bf16"]
    assert starts(work)[0]["launcher"] == "accelerate"


def test_unsupported_settings_of_accelerate_are_refused_before_anything_is_written(work: Path) -> None:
    ours = yaml.safe_load((ROOT / "launch" / "accelerate" / "ddp.yaml").read_text())
    theirs = {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2},
        "dynamo_config": {"dynamo_backend": "INDUCTOR"},
    }
    (work / "accelerate.yaml").write_text(yaml.safe_dump({**ours, **theirs, "main_process_port": 0}))
    launch = (
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file=accelerate.yaml",
        "-m",
        "dist_train.main",
    )
    assert start(work, *launch, "--config=mlp.yaml").wait(120) != 0
    text = (work / "output.txt").read_text()
    told = re.findall(r"accelerate launch: (ACCELERATE_\w+=\w+): .*launch/accelerate/ddp\.yaml", text)
    assert told == ["ACCELERATE_USE_FSDP=true", "ACCELERATE_DYNAMO_BACKEND=INDUCTOR"], text
    assert re.search(r"exitcode +: 2 ", text)
    assert not (work / "runs").exists()


@pytest.mark.chaos
def test_accelerates_settings_for_two_machines_rendezvous(work: Path) -> None:
    env = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)), "NPROC_PER_NODE": "1"}
    command = (ACCELERATE, "mlp.yaml", "trainer.duration=1ep")
    nodes = [start(work, *command, env={**env, "NODE_RANK": str(rank)}) for rank in range(2)]
    assert [node.wait(180) for node in nodes] == [0, 0], (work / "output.txt").read_text()
    assert [(line["world_size"], line["nodes"]) for line in starts(work)] == [(2, 1)], "one host"


def test_make_counts_the_gpus_that_this_shell_may_use() -> None:
    def processes(**env: str) -> str:
        done = subprocess.run(
            ["make", "-n", "train"], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
        )
        [line] = [line for line in done.stdout.splitlines() if "dist_train.main" in line]
        return line.partition("--nproc_per_node=")[2].split()[0]

    assert processes(CUDA_VISIBLE_DEVICES="") == "2"
    assert processes(CUDA_VISIBLE_DEVICES="-1") == "2"
    assert processes(CUDA_VISIBLE_DEVICES="0,2,5") == "3"
    assert processes(CUDA_VISIBLE_DEVICES="0,2,5", NPROC="1") == "1"
