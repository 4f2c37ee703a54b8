"""Fixtures of the launch script tests: a bare environment with this Python first, and a real Slurm."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_cluster import SlurmCluster, missing

ROOT = Path(__file__).resolve().parents[2]
# Variables of a launcher around pytest must not reach the jobs that the tests start.
FOREIGN = (
    *("SLURM_", "PET_", "TORCHELASTIC_", "ACCELERATE_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"),
    *("NNODES", "NODE_RANK", "NPROC", "RDZV_", "MAX_", "LOGS", "LAUNCHER"),
)

# Without the plots at the end, which take a second each.
MLP = (ROOT / "configs" / "digits_mlp.yaml").read_text() + "tracking: {tensorboard: false, report: false}\n"


@pytest.fixture(scope="session", autouse=True)
def _bare_environment() -> Iterator[None]:
    """`python` on the PATH is the one that runs the tests; no GPU; one thread per process."""
    patch = pytest.MonkeyPatch()
    for name in list(os.environ):
        if name.startswith(FOREIGN):
            patch.delenv(name)
    patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def slurm(_bare_environment: None) -> Iterator[SlurmCluster]:
    """A cluster of two nodes; skipped, with the reason, if Slurm can't run here."""
    reason = missing()
    if reason is not None:
        pytest.skip(f"no Slurm: {reason}")
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = SlurmCluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def make_work(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes directories with `mlp.yaml`, the MLP on the digits, and `planted.py`, callbacks that fail in various ways."""

    def make() -> Path:
        work = tmp_path_factory.mktemp("work")
        (work / "mlp.yaml").write_text(MLP)
        shutil.copy(Path(__file__).parent / "programs" / "planted.py", work)
        return work

    return make


@pytest.fixture
def work(make_work: Callable[[], Path]) -> Path:
    """Such a directory of the test's own."""
    return make_work()
