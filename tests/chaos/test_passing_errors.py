"""One EIO that passes, at any call of a run that writes: the run ends as if nothing had been, and each row stands once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import CONFIGS, environment

HOOK = Path(__file__).with_name("hook") / "eio.c"
# One process makes all runs: it trains with the n-th call failing, for each n of a sample.
MANY = Path(__file__).parent / "programs" / "many_runs.py"


@pytest.mark.parametrize("sample", [12, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_one_error_that_passes_is_survived_at_any_call(tmp_path: Path, sample: int) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    hook = tmp_path / "eio.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(hook), str(HOOK), "-ldl"], check=True)
    words = [sys.executable, str(MANY), str(tmp_path / "runs"), str(CONFIGS / "digits_mlp.yaml"), str(sample)]
    done = subprocess.run(words, cwd=tmp_path, env=environment(LD_PRELOAD=str(hook)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["calls"] > 100
    assert told["whole"][0] == "completed"
    assert told["other"] == {}
