"""A host that dies or loses its network: the others learn of it within seconds, and say which."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Hosts, missing
from test_failures import CONFIG

pytestmark = pytest.mark.chaos


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Three hosts, with a user's project."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    shutil.copy(Path(__file__).parent / "faulty.py", tmp_path)
    (tmp_path / "faulty.yaml").write_text(CONFIG)
    hosts = Hosts(3, tmp_path)
    yield hosts
    hosts.close()


@pytest.mark.parametrize("way", ["crash", "cut"])
def test_a_host_that_goes_is_named_and_the_others_end_their_ranks(hosts: Hosts, way: str) -> None:
    """The rank of h3 stands still at step 13 first, so that nothing else ends the run."""
    fails = {3: "hang-model@any"}
    jobs = [hosts.torchrun(i, "--config", "faulty.yaml", FAIL=fails.get(i, "none@0")) for i in (1, 2, 3)]
    deadline = time.monotonic() + 60
    while not (hosts.folder / "happened").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    began = time.monotonic()
    if way == "cut":
        hosts.cut(3)
    else:
        for pid in hosts.pids(3):
            os.kill(pid, signal.SIGKILL)
    # Agents wait a minute and more for a rendezvous with a host that is gone: it is the ranks that must be gone.
    while len(hosts.pids(1)) > 1 or len(hosts.pids(2)) > 1:
        assert time.monotonic() < began + 20, [hosts.pids(i) for i in (1, 2)]
        time.sleep(0.1)
    seconds = time.monotonic() - began
    for i in (1, 2):
        for pid in hosts.pids(i):
            os.kill(pid, signal.SIGKILL)
    told = "".join("".join(job.communicate(timeout=30)) for job in jobs[:2])
    print(told, f"{way}: gone after {seconds:.1f} s")
    lines = [line for line in told.splitlines() if line.startswith("dist_train: ")]
    assert len(lines) == 1
    assert re.fullmatch(r"dist_train: rank \d of 3 on h3 has gone in step 13 \(forward\)", lines[0])
    assert seconds < 10
    assert "no sign of life for 6 s" in told
