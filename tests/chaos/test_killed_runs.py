"""SIGKILL at every kind of moment of real runs: run again, they end with the bits of a run that was never killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import Kill, assert_each_sample_once, assert_equal_runs, assert_killed, prepare
from runs import result, run

# One run dies at each of these in turn, and begins each time where the death before has left it; `EACH` has them all.
TWO = [
    Kill("writing model.pt", 1, all=True),  # of the very first save
    Kill("step", 3, rank=1),
    Kill("published", 4),
    Kill("worker", 2, rank=1),  # a loader worker only
    Kill("evaluation", 6, rank=1),
    Kill("unpublished", 8, all=True),
    Kill("deletion", 10),
]
THREE = [
    Kill("copy", 1),
    Kill("writing ema.pt", 4, all=True),
    Kill("writing manifest.json", 6),
    Kill("step", 10, rank=2, all=True),
]


def config_of(processes: int) -> tuple[str, ...]:
    """Two processes reduce as small models do, three by DDP, whose buckets matter from three on."""
    return ("--config", "chaos.yaml", f"distributed.strategy={'ddp' if processes == 3 else 'auto'}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nobody killed, on two and on three processes."""
    folder = tmp_path_factory.mktemp("killed")
    prepare(folder)
    for processes in (2, 3):
        run(folder, processes, *config_of(processes), f"run.name=whole{processes}")
        assert_each_sample_once(folder / "runs" / f"whole{processes}")
    return folder


@pytest.mark.parametrize(("processes", "kills"), [(2, TWO), (3, THREE)], ids=["two processes", "three processes"])
def test_a_run_killed_again_and_again_ends_as_if_never_killed(folder: Path, processes: int, kills: list[Kill]) -> None:
    """With augmentation, dropout, BatchNorm, EMA, bf16, Adam, clipping and two loader workers a rank."""
    options = (*config_of(processes), f"run.name=killed{processes}")
    for kill in kills:
        assert_killed(folder, processes, kill, *options)
    run(folder, processes, *options)
    place, whole = folder / "runs" / f"killed{processes}", folder / "runs" / f"whole{processes}"
    assert_equal_runs(place, whole)
    assert_each_sample_once(place)
    assert len(list((place / "trace" / ".attempts").iterdir())) == len(kills) + 1


def test_the_comparison_would_tell(folder: Path) -> None:
    """Two and three processes differ in their last bits, since the parts of a step are summed in another order."""
    two, three = folder / "runs" / "whole2", folder / "runs" / "whole3"
    assert result(two)["weights_sha256"] != result(three)["weights_sha256"]
    with pytest.raises(AssertionError):
        assert_equal_runs(two, three)


FILES = ("model.pt", "optimizer.pt", "ema.pt", "trainer.pt", "manifest.json")
EACH = [
    Kill("start", 0),
    *(Kill("step", 9, rank) for rank in (0, 1)),
    Kill("copy", 8),
    *(Kill(f"writing {file}", step) for file in FILES for step in (1, 8)),
    *(Kill(point, step) for point in ("unpublished", "published") for step in (1, 12)),
    Kill("deletion", 12),
    *(Kill("evaluation", 12, rank) for rank in (0, 1)),
    *(Kill("worker", 5, rank) for rank in (0, 1)),
    Kill("end", 24),
]


@pytest.mark.chaos
@pytest.mark.parametrize("together", [False, True], ids=["one", "all"])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("kill", EACH, ids=lambda kill: f"{kill.point} {kill.step} rank {kill.rank}")
def test_a_run_killed_once_and_run_again_ends_as_if_never_killed(
    folder: Path, kill: Kill, processes: int, together: bool
) -> None:
    if kill.point == "worker" and together:
        pytest.skip("a loader worker dies alone")
    place = folder / "runs" / f"once-{abs(hash((kill, processes, together)))}"
    options = (*config_of(processes), f"run.name={place.name}")
    assert_killed(folder, processes, Kill(kill.point, kill.step, kill.rank, together), *options)
    run(folder, processes, *options)
    assert_equal_runs(place, folder / "runs" / f"whole{processes}")
    assert_each_sample_once(place)
