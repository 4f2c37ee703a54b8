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
# One process makes all runs: it trains with the n-th call failing, for each n that it is told.
MANY = """
import ctypes, json, os, shutil, sys

from dist_train import train

hook, place, config = ctypes.CDLL(os.environ["LD_PRELOAD"]), sys.argv[1], sys.argv[2]
sample = int(sys.argv[3])
QUICK = ["data.num_workers=0", "trainer.duration=4step", "trainer.evaluate_every=2step", "trainer.log_every=2step",
         "checkpoint.every=[2step]", "checkpoint.keep_last=1", "debug.trace_samples=true", "tracking.tensorboard=false"]
QUICK.append(f"tracking.report={str(sample > 100).lower()}")  # pictures take their time

def once(call):
    shutil.rmtree(place, ignore_errors=True)
    hook.eio_at(place.encode(), call)
    try:
        result = train(config, f"run.dir={place}", "run.name=a", *QUICK)
    except Exception as error:
        result = {"state": f"{type(error).__name__}: {error}", "weights_sha256": ""}
    calls = hook.eio_calls()
    hook.eio_at(b"", 0)
    rows, events = [], []
    for name, kept in (("metrics", rows), ("attempts", events)):
        for line in open(f"{place}/a/{name}.jsonl"):
            row = json.loads(line)
            kept.append((row.get("split") or row["event"], row.get("step")))
    return [result["state"], result["weights_sha256"], rows, events], calls

whole, calls = once(0)
other = {call: found for call in range(1, calls + 1, max(1, calls // sample)) if (found := once(call)[0]) != whole}
print("\\n" + json.dumps({"calls": calls, "whole": whole, "other": other}))
"""


@pytest.mark.parametrize("sample", [12, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_one_error_that_passes_is_survived_at_any_call(tmp_path: Path, sample: int) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    hook = tmp_path / "eio.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(hook), str(HOOK), "-ldl"], check=True)
    (tmp_path / "many.py").write_text(MANY)
    words = [sys.executable, "many.py", str(tmp_path / "runs"), str(CONFIGS / "digits_mlp.yaml"), str(sample)]
    done = subprocess.run(words, cwd=tmp_path, env=environment(LD_PRELOAD=str(hook)), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["calls"] > 100
    assert told["whole"][0] == "completed"
    assert told["other"] == {}
