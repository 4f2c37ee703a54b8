"""Train once undisturbed, then again with a transient EIO at the n-th I/O call, for many n; print how each run ended."""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

from dist_train import train

hook, place, config = ctypes.CDLL(os.environ["LD_PRELOAD"]), sys.argv[1], sys.argv[2]
sample = int(sys.argv[3])
QUICK = [
    "data.num_workers=0",
    "trainer.duration=4step",
    "trainer.evaluate_every=2step",
    "trainer.log_every=2step",
    "checkpoint.every=[2step]",
    "checkpoint.keep_last=1",
    "debug.trace_samples=true",
]
QUICK += [f"tracking.{view}={str(sample > 100).lower()}" for view in ("report", "tensorboard")]  # they take their time


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
        for line in Path(f"{place}/a/{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            kept.append((row.get("split") or row["event"], row.get("step")))
    return [result["state"], result["weights_sha256"], rows, events], calls


whole, calls = once(0)
other = {call: found for call in range(1, calls + 1, max(1, calls // sample)) if (found := once(call)[0]) != whole}
print("\n" + json.dumps({"calls": calls, "whole": whole, "other": other}))
