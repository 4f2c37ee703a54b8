"""Map-style `datasets.Dataset` (Hugging Face's), as their documentation makes them: what is trained on is their torch format."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import result, rows
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

from dist_train import train
from dist_train.config.schema import DataConfig
from dist_train.data import DataError, RandomSplit
from dist_train.data.loader import TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions, SampleReader, dataset_length, in_tensors
from dist_train.data.weighting import known_labels
from dist_train.runtime.seeding import seed_sample

LENGTH, BATCH = 20, 6


def table(length: int = LENGTH) -> dict[str, list[Any]]:
    random = np.random.RandomState(length)
    points = random.standard_normal((length, 4))
    labels = (points.sum(1) > 0).astype(int).tolist()
    ids = random.randint(0, 9, (length, 3)).tolist()
    return {"points": points.tolist(), "ids": ids, "labels": labels, "text": [f"line {k}" for k in range(length)]}


@functools.cache
def rows_of(length: int = LENGTH) -> Any:
    return pytest.importorskip("datasets", reason="needs pip install -e '.[zoo]'").Dataset.from_dict(table(length))


def halved(batch: dict[str, list[Any]]) -> dict[str, Any]:
    """As they write transforms: batches of columns, with draws of their own."""
    points = torch.tensor(batch["points"]) / 2 + torch.rand(len(batch["points"]), 1)
    return {"points": points, "labels": batch["labels"]}


def made(form: str | None = None, transform: bool = False, length: int = LENGTH) -> Any:
    """What a config names."""
    dataset = rows_of(length)
    if transform:
        dataset = dataset.with_format(None)
        dataset.set_transform(halved)
        return dataset
    return dataset.with_format(form)


def batches(dataset: Any, workers: int = 0) -> list[Any]:
    """Those of an epoch, as training reads them."""
    plan = Plan(3, len(dataset), BATCH, drop_last=False)
    options = LoaderOptions(DataConfig(train=dataset, num_workers=workers), 3, torch.device("cpu"))
    loader = TrainLoader(in_tensors(dataset), plan, options, micro_batch_size=BATCH)
    try:
        return [micro.batch for work in loader.steps(0, plan.steps_per_epoch) for micro in work.micro_batches]
    finally:
        loader.close()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("form", [None, "torch", "pandas", "arrow"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_format_gives_the_batches_of_a_plain_loop_over_the_torch_format(form: str | None, wrapped: bool) -> None:
    chosen = range(LENGTH - 1, -1, -1) if wrapped else range(LENGTH)
    torchs, plan = rows_of().with_format("torch"), Plan(3, LENGTH, BATCH, drop_last=False)
    expected = [default_collate([torchs[chosen[int(i)]] for i in plan.batch(step)]) for step in range(4)]
    read = batches(Subset(made(form), chosen) if wrapped else made(form))
    assert all(same(one, other) for one, other in zip(read, expected, strict=True))
    assert read[0]["points"].dtype == torch.float32
    assert read[0]["ids"].shape == (BATCH, 3)


def test_numpy_s_format_keeps_numpy_s_dtypes_and_chosen_columns_stay_chosen() -> None:
    numpys = rows_of().with_format("numpy", columns=["ids", "labels"])
    first = next(iter(batches(numpys)))
    expected = default_collate([numpys[int(i)] for i in Plan(3, LENGTH, BATCH, drop_last=False).batch(0)])
    assert list(first) == ["ids", "labels"]
    assert same(first, expected)
    assert list(next(iter(batches(rows_of().with_format(None, columns=["labels"]))))) == ["labels"]


def test_a_transform_draws_by_seed_epoch_and_sample() -> None:
    dataset, plan = made(transform=True), Plan(3, LENGTH, BATCH, drop_last=False)
    expected = []
    for step in range(plan.steps_per_epoch):
        samples = []
        for index in map(int, plan.batch(step)):
            seed_sample(3, 0, index)
            samples.append(dataset[index])
        expected.append(default_collate(samples))
    for workers in (0, 2):
        assert all(same(one, other) for one, other in zip(batches(dataset, workers), expected, strict=True))


def test_a_batch_is_read_at_once_where_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = in_tensors(made())
    calls: list[int] = []
    whole = type(dataset).__getitems__
    monkeypatch.setattr(type(dataset), "__getitems__", lambda self, keys: calls.append(len(keys)) or whole(self, keys))
    read = batches(dataset)
    assert calls == [6, 6, 6, 2]
    monkeypatch.setattr(SampleReader, "__init__", functools.partialmethod(_one_by_one, SampleReader.__init__))
    assert all(same(one, other) for one, other in zip(batches(dataset), read, strict=True))
    assert calls == [6, 6, 6, 2]


def _one_by_one(self: Any, init: Any, *arguments: Any) -> None:
    init(self, *arguments)
    self._at_once = False


def test_a_part_of_one_is_read_in_tensors_too() -> None:
    part = RandomSplit(made(), "val", parts=[0.5, 0.5, 0])
    assert isinstance(part[0]["points"], Tensor)


def test_balanced_weights_come_from_a_column() -> None:
    labels = table()["labels"]
    for dataset, column in [(made(), None), (made(transform=True), "labels"), (Subset(made(), [3, 1]), "labels")]:
        chosen = [labels[index] for index in dataset.indices] if isinstance(dataset, Subset) else labels
        assert known_labels(dataset, column).tolist() == chosen  # type: ignore[union-attr]
    assert known_labels(made(), "text2") is None


def test_several_datasets_in_one_are_refused_with_their_names() -> None:
    datasets = pytest.importorskip("datasets", reason="needs pip install -e '.[zoo]'")
    both = datasets.DatasetDict({"train": made(), "test": made()})
    with pytest.raises(DataError, match=r"DatasetDict holds several datasets, train, test.*split: train"):
        dataset_length(both)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(9, 3), nn.Linear(7, 2)

    def forward(self, ids: Tensor, points: Tensor) -> Tensor:
        return self.layer(torch.cat([points, self.embedding(ids).mean(1)], 1))


def test_a_config_trains_on_one_as_it_is_like_a_plain_loop(tmp_path: Path) -> None:
    rows_of()
    here = {"name": "run", "dir": str(tmp_path), "code_paths": [str(Path(__file__).parent)]}
    data = {"_target_": "test_map_datasets.made"}
    config = {
        "run": here,
        "data": {
            "train": data,
            "val": {**data, "length": 9},
            "global_batch_size": BATCH,
            "inputs": ["points", "ids"],
            "target": "labels",
        },
        "model": {"_target_": "test_map_datasets.Net"},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "metrics": ["accuracy"],
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5},
        "trainer": {"duration": "2ep", "log_every": "1step"},
        "tracking": {"tensorboard": False, "report": False},
    }
    train(config)

    torch.manual_seed(0)
    model, dataset, plan, losses = Net(), rows_of().with_format("torch"), Plan(0, LENGTH, BATCH), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(6):
        batch = default_collate([dataset[int(i)] for i in plan.batch(step)])
        loss = nn.functional.cross_entropy(model(ids=batch["ids"], points=batch["points"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [row["loss"] for row in rows(tmp_path / "run", "train")] == pytest.approx(losses, rel=1e-5)
    assert result(tmp_path / "run")["step"] == 6
