from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.data import CSV, Arrays, DataError, Digits, Gaussians, RandomSplit
from dist_train.data.reading import batch_reader
from dist_train.library.splits import SPLITS, part_sizes, split_indices


def test_the_digits_are_scikit_learns_each_in_one_split() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    expected = sorted(map(tuple, np.column_stack([bunch.data, bunch.target]).astype(int).tolist()))
    rows = []
    for split, size in [("train", 1257), ("val", 180), ("test", 360)]:
        data = Digits(split, flat=True)
        assert len(data) == size
        assert (data.inputs.min(), data.inputs.max()) == (0, 1)
        rows += torch.cat([data.inputs * 16, data.targets[:, None]], dim=1).int().tolist()
    assert sorted(map(tuple, rows)) == expected


def test_the_splits_of_the_digits_are_stratified_and_fixed() -> None:
    share = {split: torch.bincount(Digits(split).targets) for split in ("train", "val", "test")}
    whole = sum(share.values()) / 1797
    for counts in share.values():
        assert (counts - whole * counts.sum()).abs().max() <= 1
    assert Digits("val").targets[:12].tolist() == [7, 8, 7, 8, 7, 7, 3, 2, 6, 7, 1, 9]


def test_a_batch_of_digits_is_what_its_items_collate_to() -> None:
    data = Digits("val")
    indices = np.array([3, 170, 3, 0])
    inputs, targets = data.read_batch(indices)
    assert inputs.shape == (4, 1, 8, 8)
    assert inputs.equal(torch.stack([data[i][0] for i in indices]))
    assert targets.tolist() == [data[i][1] for i in indices]
    assert Digits("val", flat=True)[3][0].equal(data[3][0].flatten())


def test_an_unknown_split_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"one of train, val, test, found 'valid'"):
        Digits("valid")


@given(st.lists(st.integers(0, 30), min_size=3, max_size=3), st.integers(0, 9), st.booleans())
def test_parts_are_disjoint_and_cover_everything(counts: list[int], seed: int, stratify: bool) -> None:
    counts = [count + 2 for count in counts]
    total = sum(counts)
    labels = np.arange(total) % 3 if stratify else None
    parts = [split_indices("X", split, total, counts, seed=seed, labels=labels) for split in SPLITS]
    assert [len(part) for part in parts] == counts
    assert sorted(np.concatenate(parts).tolist()) == list(range(total))


def test_stratified_parts_have_each_class_in_its_share_even_rare_ones() -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    for split, share in zip(SPLITS, (0.6, 0.2, 0.2)):
        part = split_indices("X", split, 1000, [600, 200, 200], seed=4, labels=labels)
        counts = np.bincount(labels[part], minlength=3)
        assert np.abs(counts - share * np.array([900, 90, 10])).max() <= 1


def test_parts_are_fractions_or_counts() -> None:
    assert part_sizes(1797, [0.7, 0.1, 0.2]) == [1258, 180, 359]
    assert part_sizes(10, [1 / 3, 1 / 3, 1 / 3]) == [4, 3, 3]
    assert part_sizes(10, [0.5]) == [5]
    assert part_sizes(100, [60, 40]) == [60, 40]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([0.8, 0.3], r"sum to at most 1, found \[0.8, 0.3\] = 1.1"),
        ([60, 50], "asks for 110 samples of .*, but the dataset has 100"),
        ([60, 0.5], "either all fractions or all whole numbers"),
        ([-1, 5], "must not be negative"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        part_sizes(100, parts)


def test_gaussians_are_two_clouds_that_a_line_parts() -> None:
    data = Gaussians("train")
    assert len(data) == 200
    for label, centre in [(0, 2.7), (1, -0.7)]:
        cloud = data.inputs[data.targets == label]
        assert len(cloud) == 100
        assert (cloud.mean(0) - centre).abs().max() < 0.35
        assert (cloud.std(0) - 1).abs().max() < 0.25
    assert data[0][1].dtype == torch.float32
    best = ((data.inputs.sum(1) < 2) == (data.targets == 1)).float().mean()
    assert best > 0.98


def test_gaussians_differ_between_splits_and_seeds_but_not_between_calls() -> None:
    kinds = [Gaussians("train"), Gaussians("val"), Gaussians("test"), Gaussians("train", seed=1)]
    for k, one in enumerate(kinds):
        assert not any(one.inputs.equal(other.inputs) for other in kinds[k + 1 :])
    assert Gaussians("val").inputs.equal(kinds[1].inputs)
    assert Gaussians("val", samples=7, dimensions=3).inputs.shape == (14, 3)


def test_a_random_split_divides_any_dataset_into_disjoint_parts() -> None:
    whole = Arrays(np.arange(100.0)[:, None], np.arange(100) % 4)
    parts = [RandomSplit(whole, split, parts=[0.6, 0.2, 0.2], stratify=True) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [60, 20, 20]
    values = [int(part[i][0]) for part in parts for i in range(len(part))]
    assert sorted(values) == list(range(100))
    for part in parts:
        inputs, targets = batch_reader(part)(np.arange(len(part)))
        assert torch.bincount(torch.as_tensor(targets)).tolist() == [len(part) // 4] * 4
        assert inputs.equal(torch.stack([part[i][0] for i in range(len(part))]))
    assert batch_reader(RandomSplit(range(10), "val", parts=[7, 2])) is None
    assert [RandomSplit(range(10), "val", parts=[7, 2])[i] for i in range(2)] != [0, 1]
    indices = RandomSplit(range(10**5), "train").indices  # objects would be copied into each worker, one by one
    assert isinstance(indices[0], int)
    assert memoryview(indices).nbytes == 8 * len(indices)


def test_a_random_split_without_samples_or_classes_is_refused() -> None:
    with pytest.raises(DataError, match=r"no sample remains for test"):
        RandomSplit(range(10), "test", parts=[8, 2])
    with pytest.raises(DataError, match=r"stratify needs a class"):
        RandomSplit(Arrays(np.arange(10.0), np.arange(10.0)), "train", stratify=True)
    with pytest.raises(DataError, match=r"has no samples"):
        RandomSplit([], "train")


def test_the_diabetes_table_gives_the_r2_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import LinearRegression

    bunch = load_diabetes(scaled=False)
    path = tmp_path / "diabetes.csv"
    table = np.column_stack([bunch.data, bunch.target])
    np.savetxt(path, table, delimiter=",", header=",".join([*bunch.feature_names, "progression"]), comments="")
    train, test = (
        CSV(path, "progression", split=s, train_path=path, standardize=True, standardize_target=True)
        for s in ("train", "test")
    )
    rows = {name: np.array(part.lines) - 2 for name, part in [("train", train), ("test", test)]}
    direct = LinearRegression().fit(bunch.data[rows["train"]], bunch.target[rows["train"]])
    scaled = LinearRegression().fit(train.inputs.numpy(), train.targets.numpy())
    predicted = test.original_units(torch.from_numpy(scaled.predict(test.inputs.numpy())))
    assert np.allclose(predicted, direct.predict(bunch.data[rows["test"]]), rtol=1e-3)
