"""bench/gpu_check: all of it on a GPU; here, what a CPU can run of it quickly, so that it doesn't fall behind the engine."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import torch

sys.path.append(str(runs.ROOT / "bench"))
import gpu_parts

SCRIPT = runs.ROOT / "bench/gpu_check"
SPACE = runpy.run_path(str(SCRIPT))
PARTS = dict(SPACE["PARTS"])


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(line, env=runs.environment(), text=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("name", ["overflow", "dtypes", "waits", "hostcopy", "splits"])
def test_a_part_runs_on_the_cpu_too(name: str) -> None:
    findings = list(gpu_parts.PARTS[name](torch.device("cpu")))
    assert findings
    assert all(finding["ok"] for finding in findings), findings


def test_the_script_appends_what_it_finds_and_continues_after_a_part_that_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, main = tmp_path / "new/found.jsonl", SPACE["main"]
    monkeypatch.setitem(main.__globals__, "PARTS", {"hang": (1, ""), "speed": (60, "")})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--out", str(out)])
    assert main() == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["part"], line["outcome"], line.get("why")) for line in lines] == [
        ("hang", "too long", None),
        ("speed", "skipped", "needs a GPU"),
        ("speed", "skipped", None),
    ]
    assert all(line["hardware"] and line["versions"]["torch"] == torch.__version__ for line in lines)
    assert all(isinstance(line["seconds"], float) for line in lines)


def test_the_script_says_what_there_is_and_what_it_cannot_do() -> None:
    listed = check("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(PARTS)
    assert sorted(gpu_parts.PARTS) == sorted(PARTS)
    assert check("nothing").returncode == 2
    assert "pydantic" in check("--help").stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests"])
def test_a_part_is_ok(name: str, tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    line = [sys.executable, str(SCRIPT), name, "--out", str(out)]
    done = subprocess.run(line, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(json.loads(found)["outcome"] == "ok" for found in out.read_text().splitlines())
