"""doctor reports whether all hosts are ready for a job, and names the one that isn't."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing import CONFIG
from hosts import Hosts, missing
from runs import CONFIGS, ROOT, forks_workers, run

from dist_train.commands import doctor
from dist_train.config.errors import ConfigError
from dist_train.watch import signals


@pytest.fixture
def hosts(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Two hosts, or as many as `request` says."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    hosts = Hosts(getattr(request, "param", 2), tmp_path)
    yield hosts
    hosts.close()


def examine(hosts: Hosts, *arguments: str, before: str = "", **env: str) -> dict[str, object]:
    """doctor on all hosts, with `before` and `env` on h2 only; the exit codes agree with what it found."""
    extra = {2: {"before": before, **env}}
    jobs = [
        hosts.torchrun(i, "doctor", "--json", "found.json", *arguments, **{**forks_workers(), **extra.get(i, {})})
        for i in range(1, hosts.count + 1)
    ]
    printed = ["\n".join(job.communicate(timeout=120)) for job in jobs]
    found = json.loads((hosts.folder / "found.json").read_text())
    for job, text in zip(jobs, printed, strict=True):
        assert (job.returncode == 0) == found["ok"], text
    if not found["ok"]:
        assert "look at h" in printed[0]
    return {**found, "states": {check["name"]: check for check in found["checks"]}}


def test_another_version_a_full_shared_memory_and_a_directory_that_cannot_be_written_are_reported_with_their_host(
    hosts: Hosts,
) -> None:
    other = hosts.folder / "other"
    shutil.copytree(ROOT / "dist_train", other / "dist_train")
    package = other / "dist_train" / "__init__.py"
    package.write_text(package.read_text() + "\n# another state of the code\n")
    (hosts.folder / "runs").mkdir()
    before = (  # the folder may itself be below /dev/shm
        'mount --bind . /mnt && mount -t tmpfs -o size=100m tmpfs /dev/shm && mkdir -p "$PWD" && mount --bind /mnt "$PWD" && '
        'cd "$PWD" && '
        "head -c 90m /dev/zero >/dev/shm/full && "
        "mount --bind runs runs && mount -o remount,ro,bind runs"
    )
    found = examine(hosts, before=before, PYTHONPATH=os.pathsep.join([str(other), *forks_workers().values()]))
    states = found["states"]
    for name in ("dist_train", "/dev/shm", "run.dir"):
        assert states[name]["state"] == "FAIL"
        assert states[name]["hosts"] == ["h2"]
    assert found["bad_hosts"] == ["h2"]
    assert all(states[name]["state"] == "ok" for name in ("python", "torch", "clocks", "all-reduce"))


@pytest.mark.chaos
@pytest.mark.parametrize("hosts", [3], indirect=True)
def test_a_slow_link_is_found_against_a_floor(hosts: Hosts) -> None:
    hosts.slow(3, "20mbit")
    found = examine(hosts, "--min-bandwidth", "0.03")
    assert found["bad_hosts"] == ["h3"]
    assert found["states"]["bandwidth"]["state"] == "FAIL"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_hosts_that_are_ready_try_a_config_and_leave_nothing_behind(tmp_path: Path, processes: int) -> None:
    arguments = ("doctor", "--config", str(CONFIGS / "digits.yaml"), "--json", "found.json")
    done = run(tmp_path, processes, *arguments)
    for part in ("DigitsCNN", "(8, 1, 8, 8) float32 0 ... 1", "loss of 3 steps", "loss in evaluation", "doctor: ready"):
        assert part in done.stdout
    assert "Python objects" not in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"]
    assert found["world_size"] == len(found["ranks"]) == processes
    assert {check["state"] for check in found["checks"]} == {"ok"}
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_a_dry_run_fails_as_training_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "tests" / "failures" / "faulty.py", tmp_path)
    (tmp_path / "faulty.yaml").write_text(
        CONFIG.replace("faulty.Model, in_features: 64", "faulty.Model, in_features: 65")
    )
    monkeypatch.chdir(tmp_path)
    try:
        assert doctor.main(["--config", "faulty.yaml", "--json", "found.json"]) == 1
    finally:
        signals.restore()
    printed = capsys.readouterr().out
    assert "mat1 and mat2 shapes cannot be multiplied" in printed
    assert "not ready: dry run" in printed
    assert not json.loads((tmp_path / "found.json").read_text())["ok"]
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        doctor.main(["--config", "faulty.yaml", "optimizer.lr=fast"])
