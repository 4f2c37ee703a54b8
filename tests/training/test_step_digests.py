"""What `debug.digest` records are the digests of the gradients and weights of a plain loop, whatever the optimizers."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dist_train import train
from dist_train.callbacks import Callback
from dist_train.data.plan import Plan
from dist_train.files import StorageError
from dist_train.objective.modules import Modules
from dist_train.runtime.rundir import RunDir
from dist_train.runtime.sharing import Sharing
from dist_train.step.digest import TensorDigests
from dist_train.tracking.digests import DigestFile, Digests, file_name
from dist_train.training.digests import StepDigests, resume_digests

DATA = TensorDataset(
    torch.randn(24, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1)),
)
QUIET = {"tensorboard": False, "report": False}


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def config(folder: Path, **keys: Any) -> dict[str, Any]:
    return {
        "run": {"name": "run", "dir": str(folder)},
        "data": {"train": DATA, "global_batch_size": 6, "num_workers": 0},
        "model": network(),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        "trainer": {"duration": "6step", "log_every": "4step"},
        "tracking": QUIET,
        "debug": {"digest": True},
        **keys,
    }


def read(folder: Path) -> tuple[Digests, dict[str, list[int]]]:
    """The file of the run's only rank, and its columns by name."""
    found = Digests.parse((folder / "run" / file_name(0)).read_bytes())
    return found, {name: found.values[:, k].tolist() for k, name in enumerate(found.names)}


def digest(tensor: Tensor) -> int:
    return int(TensorDigests()([tensor])) % 2**64


def test_they_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    net, plan = copy.deepcopy(network()), Plan(0, 24, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    expected: list[dict[str, int]] = []
    for step in range(6):
        inputs, targets = DATA[plan.batch(step).tolist()]
        nn.functional.cross_entropy(net(inputs), targets).backward()
        row = {f"gradient {name}": digest(p.grad) for name, p in net.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        row |= {f"weight {name}": digest(parameter) for name, parameter in net.named_parameters()}
        expected.append(row | {f"buffer {name}": digest(buffer) for name, buffer in net.named_buffers()})
    train(config(tmp_path))
    found, columns = read(tmp_path)
    assert found.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert [name for name in found.names if name != "loss"] == list(expected[0])
    for step, row in enumerate(expected):
        assert {name: columns[name][step] for name in row} == row, f"step {step + 1}"


def test_the_gradient_is_the_one_before_clipping_and_the_weights_those_after_callbacks(tmp_path: Path) -> None:
    class Doubles(Callback):
        def on_step_end(self, trainer: Any) -> None:
            if trainer.step == 2:
                with torch.no_grad():
                    trainer.model[0].bias.mul_(2)

    train(config(tmp_path / "plain"))
    keys = {"duration": "6step", "clip_grad_norm": 1e-3, "clip_grad_value": 1e-3}
    train(config(tmp_path / "clipped", trainer=keys))
    train(config(tmp_path / "doubled", callbacks=[Doubles()]))
    plain, clipped, doubled = (read(tmp_path / name)[1] for name in ("plain", "clipped", "doubled"))
    assert clipped["gradient 0.weight"][0] == plain["gradient 0.weight"][0]
    assert clipped["weight 0.weight"][0] != plain["weight 0.weight"][0]
    assert doubled["weight 0.bias"][0] == plain["weight 0.bias"][0]
    assert doubled["weight 0.bias"][1] != plain["weight 0.bias"][1]
    assert doubled["weight 0.weight"][1] == plain["weight 0.weight"][1]


def test_a_frozen_parameter_has_no_gradient_and_keeps_its_weight(tmp_path: Path) -> None:
    train(config(tmp_path, transfer={"freeze": ["0.*"]}))
    columns = read(tmp_path)[1]
    assert columns["gradient 0.weight"] == [0] * 6
    assert len(set(columns["weight 0.weight"])) == 1
    assert 0 not in columns["gradient 3.weight"]
    assert len(set(columns["weight 3.weight"])) == 6


def test_of_several_optimizers_each_has_its_loss_and_gradients_where_it_moves(tmp_path: Path) -> None:
    both = {
        name: {"_target_": "torch.optim.Adam", "lr": 5e-4, "match": f"{name}.*"}
        for name in ("discriminator", "generator")
    }
    keys = config(tmp_path, optimizer=both, model={"_target_": "dist_train.models.DigitsGAN", "latent": 4})
    keys |= {"data": {"train": {"_target_": "dist_train.data.Digits"}, "global_batch_size": 16, "num_workers": 0}}
    keys |= {
        "task": {"_target_": "dist_train.tasks.GAN", "latent": 4, "critic_steps": 3},
        "checkpoint": {"keep_best": None},
    }
    del keys["loss"]
    train(keys)
    columns = read(tmp_path)[1]
    assert [bool(value) for value in columns["loss (discriminator)"]] == [True] * 6
    moved = [bool(value) for value in columns["loss (generator)"]]
    assert sum(moved) == 2
    for name, values in columns.items():
        if name.startswith("gradient "):
            own = name.partition("(")[2][:-1] == name.split()[1].partition(".")[0]
            expected = [False] * 6 if not own else moved if "(generator)" in name else [True] * 6
            assert [bool(value) for value in values] == expected, name
    weights = next(values for name, values in columns.items() if name.startswith("weight generator"))
    assert len(set(weights)) == 1 + sum(moved[1:])


def test_an_optimizer_that_computes_the_gradient_several_times_has_the_first_one_recorded(tmp_path: Path) -> None:
    lbfgs = {"_target_": "torch.optim.LBFGS", "lr": 0.5, "max_iter": 4}
    keys = {"data": {"train": DATA, "global_batch_size": "all", "num_workers": 0}, "trainer": {"duration": "2step"}}
    train(config(tmp_path / "lbfgs", optimizer=lbfgs, **keys))
    train(config(tmp_path / "sgd", **keys))
    lbfgs_columns, sgd = read(tmp_path / "lbfgs")[1], read(tmp_path / "sgd")[1]
    assert lbfgs_columns["gradient 0.weight"][0] == sgd["gradient 0.weight"][0]
    assert lbfgs_columns["weight 0.weight"][0] != sgd["weight 0.weight"][0]


class Sink:
    """A file that may fail; `rows` is what it was given."""

    def __init__(self, error: Exception | None = None):
        self.rows: list[tuple[int, np.ndarray]] = []
        self.error, self.closed = error, False

    def write(self, steps: list[tuple[int, np.ndarray]], *, sync: bool = False) -> None:
        if self.error is not None:
            raise self.error
        self.rows += steps

    def close(self) -> None:
        self.closed = True


def test_what_a_failing_start_has_left_is_written_at_its_end_if_that_is_possible() -> None:
    for error in (None, StorageError("the disk is full"), RuntimeError("CUDA error: device-side assert triggered")):
        sink = Sink(error)
        digests = StepDigests(Modules(network()), (), lambda names, sink=sink: sink)  # type: ignore[misc]
        digests.take(1)
        assert sink.rows == []
        digests.close()
        assert sink.closed
        assert [step for step, _ in sink.rows] == ([1] if error is None else [])


def test_they_are_written_before_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_train.training.digests.MAX_UNWRITTEN", 3)
    sink = Sink()
    digests = StepDigests(Modules(network()), (), lambda names: sink)
    for step in range(1, 6):
        digests.take(step)
    assert [step for step, _ in sink.rows] == [1, 2, 3]


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    """A run under a URL, as one host after another sees it."""
    place = f"memory://{uuid.uuid4().hex}/runs/far"

    def each() -> Iterator[RunDir]:
        for number in range(3):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host{number}"))
            run = RunDir(place)
            run.uploaded = None
            yield run

    return each()


def resume(run: RunDir, rank: int, size: int, step: int, *, writes: bool) -> None:
    """As a rank does whose host has no other one."""
    run.sharing = Sharing(rank, size, (rank,), (rank,))
    world: Any = SimpleNamespace(rank=rank, size=size, is_main=rank == 0)
    resume_digests(run, world, step, writes=writes)


def record(run: RunDir, rank: int, last: int) -> None:
    file = DigestFile(run.path(file_name(rank)), rank, ["loss"], 0)
    file.write([(step, np.array([100 * rank + step])) for step in range(1, last + 1)])
    file.close()


def test_a_host_uploads_the_files_of_its_own_ranks_and_rank_0_those_of_ranks_that_are_gone(
    hosts: Iterator[RunDir],
) -> None:
    """Four ranks on one host recorded 9 steps; from the checkpoint of step 5 there are two, on two other hosts."""
    before, first, second = next(hosts), next(hosts), next(hosts)
    for rank in range(4):
        record(before, rank, 9)
    before.upload()
    for rank in (0, 1, 2):  # what the new hosts have in their caches from some other time
        record(first, rank, 2)
        record(second, rank, 3)
    resume(second, 1, 2, 5, writes=True)
    resume(first, 0, 2, 5, writes=True)
    assert [path.name for path in sorted(second.path("digest").iterdir())] == ["rank-0001.jsonl"]
    assert [path.name for path in sorted(first.path("digest").iterdir())] == [
        "rank-0000.jsonl", "rank-0002.jsonl", "rank-0003.jsonl",
    ]  # fmt: skip
    first.upload(["digest"])
    steps = [Digests.parse(before.storage.read_bytes(file_name(rank))).steps[-1] for rank in (1, 2, 3)]
    assert steps == [9, 5, 5], "rank 1 cuts its own when it opens it"
    resume(first, 0, 1, 2, writes=False)
    first.upload(["digest"])
    assert [Digests.parse(before.storage.read_bytes(file_name(rank))).steps[-1] for rank in range(4)] == [2, 2, 2, 2]
