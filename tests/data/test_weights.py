"""Weighted sampling: torch's WeightedRandomSampler with replacement, as a function of (seed, epoch, length, weights)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import rows
from scipy import stats
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from dist_train import train
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.config.schema import DataConfig
from dist_train.data import Arrays, DataError, Digits, RandomShift, RandomSplit
from dist_train.data.augment import Augmentation
from dist_train.data.errors import SampleError
from dist_train.data.plan import Plan, StepSampler
from dist_train.data.reading import LoaderOptions, SampleReader
from dist_train.data.weighting import known_labels, sampling_weights
from dist_train.data.weights import Weights

SKEWED = [0.0, 1.0, 3.0, 0.25, 10.0, 0.75, 0.0, 5.0]


def plan_of(weights: Any = SKEWED, seed: int = 0, **options: Any) -> Plan:
    given = Weights.of(weights, len(weights))
    return Plan(seed, len(weights), **{"global_batch_size": 3, "weights": given, **options})


def weights_of(setting: Any, dataset: Any, **options: Any) -> Weights:
    config = DataConfig(train=object(), weights=setting, **options)
    found = sampling_weights(dataset, LoaderOptions(config, 0, torch.device("cpu")))
    assert found is not None
    return found


def numbers(weights: Weights) -> list[float]:
    return np.diff(weights.cumulative, prepend=0).round(9).tolist()


def test_the_order_is_pinned_forever() -> None:
    plan = plan_of()
    assert plan.order(0).tolist() == [7, 4, 4, 1, 1, 4, 7, 4]
    assert plan.order(1).tolist() == [4, 1, 2, 4, 4, 4, 4, 7]
    assert plan.record() == {"length": 8, "fingerprint": "94b4df1ed28ae4ea", "weights": "1d11cae342096cc3"}


def test_samples_are_drawn_as_often_as_torch_s_sampler_draws_them() -> None:
    plan, epochs = plan_of(), 5000
    drawn = np.bincount(np.concatenate([plan.order(epoch) for epoch in range(epochs)]), minlength=8)
    expected = np.array(SKEWED) / sum(SKEWED) * drawn.sum()
    assert drawn.sum() == 8 * epochs
    assert drawn[[0, 6]].tolist() == [0, 0]
    positive = expected > 0
    assert stats.chisquare(drawn[positive], expected[positive]).pvalue > 0.001
    theirs = WeightedRandomSampler(SKEWED, 8 * epochs, generator=torch.Generator().manual_seed(1))
    both = np.array([drawn, np.bincount(list(theirs), minlength=8)])[:, positive]
    assert stats.chi2_contingency(both).pvalue > 0.001
    wrong = np.roll(expected[positive], 1)  # a negative control
    assert stats.chisquare(drawn[positive], wrong).pvalue < 1e-9


def test_draws_of_an_epoch_are_independent_of_each_other() -> None:
    orders = np.array([plan_of([1.0, 1.0, 2.0]).order(epoch) for epoch in range(9000)])
    table = np.zeros((3, 3))
    np.add.at(table, (orders[:, 0], orders[:, 1]), 1)
    assert stats.chi2_contingency(table).pvalue > 0.001


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-300, 1e300)), min_size=1, max_size=40).filter(any),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_sample_of_weight_0_is_ever_drawn_however_large_the_others_are(weights: list[float], seed: int) -> None:
    drawn = plan_of(weights, seed, global_batch_size=1).order(3)
    assert len(drawn) == len(weights)
    assert all(weights[index] > 0 for index in drawn)


def test_the_largest_uniform_number_draws_the_last_sample_with_a_weight() -> None:
    class Largest:
        def random_sample(self, count: int) -> Any:
            return np.full(count, 1 - 2.0**-53)

    for total in (1.0, 1.5, 3.0, 1e-310, 7e300):
        assert Weights.of([total, 0.0], 2).draw(Largest(), 4).tolist() == [0] * 4  # type: ignore[arg-type]


@given(
    world_size=st.integers(1, 6), micro=st.integers(1, 5), neighbours=st.integers(0, 2), step=st.integers(0, 10),
    drop_last=st.booleans(),
)  # fmt: skip
def test_any_number_of_ranks_reads_the_same_samples_under_the_same_keys(
    world_size: int, micro: int, neighbours: int, step: int, drop_last: bool
) -> None:
    plan = plan_of(drop_last=drop_last)
    assert plan.steps_per_epoch == Plan(0, 8, 3, drop_last=drop_last).steps_per_epoch
    batch = plan.batch(step)
    start = step % plan.steps_per_epoch * 3
    for rank in range(world_size):
        for request in plan.micro_batches(step, rank, world_size, micro, neighbours):
            places = (request.position + np.arange(len(request.indices))) % len(batch)
            assert request.indices.tolist() == batch[places].tolist()
            assert request.random_keys.tolist() == (start + places).tolist()


def test_resuming_anywhere_gives_the_same_samples() -> None:
    whole = [request.indices.tolist() for request in _requests(plan_of(), 0)]
    for step in (1, 3, 5):
        assert [request.indices.tolist() for request in _requests(plan_of(), step)] == whole[step:]


def _requests(plan: Plan, step: int) -> list[Any]:
    sampler = StepSampler(plan, rank=0, world_size=1, micro_batch_size=3)
    sampler.set_steps(step, 7)
    return list(sampler)


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3), index


def test_two_copies_of_a_sample_in_a_step_draw_differently() -> None:
    plan = plan_of([1.0] + [0.0] * 7, global_batch_size=4)
    (request,) = plan.micro_batches(1, 0, 1, 4)
    assert request.indices.tolist() == [0] * 4
    read = SampleReader(Noisy(), 5).__getitems__(request).batch
    assert len(np.unique(read[0].numpy())) == 12
    halves = [SampleReader(Noisy(), 5).__getitems__(one).batch[0] for one in plan.micro_batches(1, 0, 1, 2)]
    assert torch.equal(torch.cat(halves), read[0])

    images = torch.rand(1, 1, 9, 9).expand(4, -1, -1, -1)
    shift = Augmentation([RandomShift(4)])
    shifted, _ = shift((images, read[1]), seed=5, epoch=0, indices=request.random_keys)
    same, _ = shift((images, read[1]), seed=5, epoch=0, indices=request.indices)
    assert len({image.numpy().tobytes() for image in shifted}) > 1
    assert len({image.numpy().tobytes() for image in same}) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], "one weight for each of the 4 samples, found 2"),
        ([[1.0]] * 4, r"found an array of shape \(4, 1\)"),
        ([1.0, -0.5, 1.0, 1.0], "at least 0, found -0.5 for sample 1"),
        ([1.0, 1.0, float("nan"), 1.0], "found nan for sample 2"),
        ([1.0, 1.0, 1.0, float("inf")], "found inf for sample 3"),
        ([0.0] * 4, "all are 0"),
        ([1e308] * 4, "their sum is infinite"),
        (["a"] * 4, "expected a number for each sample"),
    ],
)
def test_weights_that_make_no_sense_are_refused_by_name(values: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.weights: .*{message}"):
        Weights.of(values, 4, "w.npy")


def test_files_of_three_kinds_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHERE", str(tmp_path))
    np.save("w.npy", np.array([1, 2, 3], dtype=np.int32))
    Path("w.csv").write_text("weight\n1\n2.0\n3e0\n")
    Path("w.txt").write_text("1\n2\n\n3\n")
    data = TensorDataset(torch.zeros(3, 1))
    found = [weights_of(name, data) for name in ("w.npy", "$WHERE/w.csv", "w.txt")]
    assert all(numbers(weights) == [1, 2, 3] for weights in found)
    assert len({weights.digest for weights in found}) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.npy", None, "no file none.npy"),
        ("w.txt", "weight\n1\n", r"w\.txt:1: expected one number on each line, found 'weight'"),
        ("w.csv", "weight\n1\n1,2\n", r"w\.csv:3: expected one number on each line, found '1,2'"),
        ("w.pt", "", r"expected a \.npy, \.csv or \.txt file"),
        ("w.npy", "no array", "can't be read"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path(name).write_text(text)
    with pytest.raises(DataError, match=rf"data\.weights: .*{message}"):
        weights_of(name, TensorDataset(torch.zeros(1, 1)))


def of_length(dataset: Any, power: float = 1.0) -> Any:
    return torch.arange(1, len(dataset) + 1) ** power


def test_a_function_of_the_dataset_gives_them() -> None:
    spec = {"_target_": "test_weights.of_length", "power": 2}
    assert numbers(weights_of(spec, Noisy())) == [k**2 for k in range(1, 9)]
    assert numbers(weights_of(of_length, Noisy())) == list(range(1, 9))


def test_a_function_that_draws_of_itself_is_refused_where_ranks_would_differ() -> None:
    config = DataConfig(train=object(), weights=of_length)
    options = LoaderOptions(config, 0, torch.device("cpu"), 0, 2, 2, None, lambda value: [value, "another"])
    with pytest.raises(DataError, match=r"data\.weights: of_length gives rank 1 other weights than rank 0"):
        sampling_weights(Noisy(), options)


def test_a_stream_is_refused_by_name() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(DataError, match=r"data\.weights: .*Stream is an IterableDataset"):
        weights_of("balanced", Stream())


class Unlabeled(Dataset[Any]):
    """Its classes are known only from reading it."""

    def __init__(self, kind: str = "pair") -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        label = "ababb"[index]
        samples = {
            "pair": (torch.zeros(2), label),
            "tensor": (torch.zeros(2), torch.tensor(ord(label))),
            "dict": {"x": index, "meta": {"label": label}},
            "number": (index, 0.5 * index),
            "image": torch.zeros(3, 3),
        }
        return samples[self.kind]


@pytest.mark.parametrize("kind", ["pair", "tensor", "dict"])
def test_balanced_reads_the_labels_once_where_it_must_and_says_so(kind: str) -> None:
    keys = {"inputs": "x", "target": "meta.label"} if kind == "dict" else {}
    weights = weights_of("balanced", Unlabeled(kind), **keys)
    assert numbers(weights) == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 3])
    assert weights.origin.startswith("balanced over 2 classes of 2 to 3 samples, by labels that were read")


def test_balanced_shares_the_reading_among_ranks() -> None:
    config, asked = DataConfig(train=object(), weights="balanced"), []

    def all_gather(value: Any) -> list[Any]:
        asked.append(value)
        return [["a", "b", "a"], value] if isinstance(value, list) else [value, value]

    options = LoaderOptions(config, 0, torch.device("cpu"), 1, 2, 2, None, all_gather)
    weights = sampling_weights(Unlabeled(), options)
    assert weights is not None
    assert asked[0] == ["b", "b"]
    assert weights.digest == weights_of("balanced", Unlabeled()).digest


def test_balanced_takes_the_labels_that_a_dataset_has() -> None:
    digits = Digits("val")
    weights = weights_of("balanced", digits)
    counts = np.bincount(digits.targets)
    assert numbers(weights) == pytest.approx((1 / counts[digits.targets]).tolist())
    assert weights.origin.endswith("by its labels")
    drawn = Plan(0, len(digits), 10, weights=weights)
    labels = np.concatenate([digits.targets.numpy()[drawn.order(epoch)] for epoch in range(300)])
    assert stats.chisquare(np.bincount(labels)).pvalue > 0.001


def test_labels_follow_the_samples_of_a_part() -> None:
    digits = Digits("val")
    part = Subset(digits, [5, 3, 100])
    assert known_labels(part).tolist() == digits.targets[[5, 3, 100]].tolist()  # type: ignore[union-attr]
    half = RandomSplit(digits, "train", parts=[0.5, 0.5, 0])
    assert known_labels(half).tolist() == [half[index][1] for index in range(len(half))]  # type: ignore[union-attr]


def test_labels_that_are_changed_while_reading_are_read() -> None:
    data = Arrays(np.zeros((4, 2)), np.array([0, 1, 2, 3]), target_transform=lambda label: int(label) // 3)
    assert known_labels(data) is None
    assert numbers(weights_of("balanced", data)) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])


def test_what_has_no_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.weights: balanced needs a class .*found float64 of shape \(5,\)"):
        weights_of("balanced", Unlabeled("number"))
    with pytest.raises(SampleError, match=r"label of sample 0 .*set data\.inputs and data\.target"):
        weights_of("balanced", Unlabeled("image"))


def test_the_record_of_a_plan_covers_every_weight() -> None:
    tail = Weights.of([1.0] * 5000 + [0.0], 5001), Weights.of([1.0] * 5000 + [1e-9], 5001)
    plans = [Plan(0, 5001, 100, weights=weights) for weights in tail]
    assert plans[0].fingerprint() == plans[1].fingerprint()
    assert plans[0].record() != plans[1].record()
    assert "weights" not in Plan(0, 5001, 100).record()


def config_of(folder: Path, weights: Any, **keys: Any) -> dict[str, Any]:
    return {
        "run": {"name": "run", "dir": str(folder)},
        "data": {
            "train": {"_target_": "dist_train.data.Digits", "split": "val", "flat": True},
            "global_batch_size": 60,
            "weights": weights,
        },
        "model": {"_target_": "dist_train.models.MLP", "in_features": 64, "hidden": [8], "out_features": 10},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "2ep", **keys},
        "tracking": {"tensorboard": False, "report": False},
        "debug": {"trace_samples": True},
    }


def test_a_run_reads_what_its_plan_says_and_refuses_other_weights_when_it_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, file = np.linspace(0, 1, 180) ** 4, tmp_path / "w.npy"
    np.save(file, weights)
    train(config_of(tmp_path, str(file), stop_at="4step"))
    said = " ".join(capsys.readouterr().out.split())
    assert f"180 samples each, drawn with replacement: weights {file}" in said
    (trace,) = (tmp_path / "run" / "trace").glob("*.jsonl")
    plan = plan_of(weights, global_batch_size=60)
    read = [json.loads(line)["indices"] for line in trace.read_text().splitlines()]
    assert read == [plan.batch(step).tolist() for step in range(4)]

    np.save(file, weights + 1e-9)
    with pytest.raises(ConfigError, match=r"data\.weights: this run has drawn its samples by other weights"):
        train(config_of(tmp_path, str(file)))
    np.save(file, weights)
    train(config_of(tmp_path, str(file)))
    assert rows(tmp_path / "run", "train")[-1]["step"] == 6


def test_a_config_with_weights_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.weights: expected one weight for each of the 180 samples, found 3"):
        train(config_of(tmp_path, [1, 2, 3]))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"write them into a \.npy file"):
        load_config(config_of(tmp_path, torch.ones(100_001)))
    short = load_config(config_of(tmp_path, torch.tensor([1.0, 0.5])))
    assert short.data.weights == [1.0, 0.5]
