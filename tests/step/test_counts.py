"""The engine costs nothing: no host sync in a step, and no collective beyond DDP's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from runs import environment

# Of three steps: the loss, to check it and to add it up, and its weight. On the CPU a read waits for nothing; for a device
# test_fake_cuda.py lists what would wait.
ON_CPU = 9
JOB = Path(__file__).parent / "programs" / "counts.py"


def test_a_step_reads_three_numbers_on_the_cpu_and_starts_no_more_collectives_than_a_raw_ddp_loop(
    tmp_path: Path,
) -> None:
    """With accumulation, clipping, a loss whose denominator depends on the targets, and the check for inf and nan."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(JOB)],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["raw"]["collectives"] == ["gloo:all_reduce"] * 3, "the count itself sees nothing"
    assert counts["ddp"] == {"reads": ON_CPU, "collectives": ["gloo:all_reduce"] * 3}
    # A small model: one message to the other rank, and one from it; on the same machine over a socket.
    assert counts["far"] == {"reads": ON_CPU, "collectives": ["gloo:recv"] * 3 + ["gloo:send"] * 3}
    assert counts["near"] == {"reads": ON_CPU, "collectives": []}
    # Nor do those of a whole run, by what three more of them cost: with schedule, EMA and clipping.
    assert counts["train auto"] == {"reads": ON_CPU, "collectives": []}
    assert counts["train ddp"] == {"reads": ON_CPU, "collectives": ["gloo:all_reduce"] * 3}
    assert counts["train digests"] == counts["train ddp"], "digests cost neither"
    # Several losses travel with the gradient; where each has a denominator of its own, one all-gather precedes the backward.
    assert counts["train losses"] == {"reads": ON_CPU, "collectives": ["gloo:all_reduce"] * 3}
    assert counts["train own weights"] == {
        "reads": ON_CPU,
        "collectives": ["gloo:all_gather"] * 3 + ["gloo:all_reduce"] * 3,
    }
