"""The gradient of many micro-batches on many ranks is that of one big batch, whatever the loss's denominator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

JOB = Path(__file__).parent / "programs" / "gradients.py"


@pytest.mark.parametrize("ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.chaos)])
def test_gradient_of_all_micro_batches_and_ranks_is_that_of_one_big_batch(ranks: int, tmp_path: Path) -> None:
    temporary = tmp_path / ("long" * 40)  # longer than the address of a socket may be
    temporary.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(JOB)],
        env=environment(TMPDIR=str(temporary)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert not list(temporary.glob("dist_train-*"))
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 7 * 3 + 2 if ranks == 1 else 3 * (7 * 3 + 3), (
        "one process; or a single bucket, over sockets and over gloo, and DDP"
    )
    assert {name: error for name, error in errors.items() if not error < 1e-6} == {}
