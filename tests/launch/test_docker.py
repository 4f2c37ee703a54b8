"""Checks of the image without building it: its health check on run records, and the files that it copies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


def check(runs: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "docker" / "healthcheck.py"), str(runs), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip() + done.stderr


def record(runs: Path, name: str, state: str, age: float = 0.0) -> None:
    (runs / name).mkdir(parents=True, exist_ok=True)
    path = runs / name / "status.json"
    path.write_text(json.dumps({"state": state}))
    os.utime(path, (time.time() - age,) * 2)


def test_no_run_is_healthy(tmp_path: Path) -> None:
    assert check(tmp_path)[0] == 0


@pytest.mark.parametrize(("state", "code"), [("running", 0), ("completed", 0), ("preempted", 0), ("failed", 1)])
def test_the_newest_runs_state_decides(tmp_path: Path, state: str, code: int) -> None:
    record(tmp_path, "old", "failed", age=100)
    record(tmp_path, "new", state)
    assert check(tmp_path)[0] == code


def test_a_running_run_is_unhealthy_unless_it_keeps_writing_files(tmp_path: Path) -> None:
    record(tmp_path, "run", "running", age=2000)
    code, text = check(tmp_path)
    assert code == 1
    assert "run: running, last heartbeat 2000 s ago" in text
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert check(tmp_path)[0] == 0
    time.sleep(0.1)
    assert check(tmp_path, "0.05")[0] == 1


def test_all_files_that_the_image_copies_exist_and_are_sent_to_the_builder() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    sources = [word for word in copied if not word.startswith("--")]
    assert len(sources) > 6
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in allowed, f"{source} is left out by .dockerignore"


def test_the_image_installs_locked_dependencies_before_the_code_and_does_not_run_as_root() -> None:
    order = [
        "COPY pyproject.toml constraints.txt",
        "-c constraints.txt",
        "COPY dist_train",
        "USER trainer",
        "ENTRYPOINT [",
    ]
    places = [DOCKERFILE.index(text) for text in order]
    assert places == sorted(places)


def test_the_compose_file_parses_and_gives_processes_shared_memory_and_time_to_save() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert set(services) == {"cpu", "gpu"}
    for service in services.values():
        assert service["shm_size"] == "8gb"
        assert service["stop_grace_period"] == "5m"
        assert any(volume.endswith(":/app/runs") for volume in service["volumes"])
