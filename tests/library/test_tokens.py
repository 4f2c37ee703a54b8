"""Windows of tokens: those of nanoGPT's get_batch at the same offsets, and of a plain packing by numpy."""

from __future__ import annotations

import json
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, default_collate

from dist_train.config.schema import DataConfig
from dist_train.data import DataError, PackedTokens, Tokens, pack_tokens
from dist_train.data.loader import TrainLoader
from dist_train.data.plan import Plan
from dist_train.data.reading import LoaderOptions
from dist_train.runtime.seeding import seed_sample

NUMBERS = np.random.RandomState(0).randint(0, 50257, 1000)


def get_batch(path: Path, offsets: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As nanoGPT's train.py has it, with the offsets given instead of drawn."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    x = torch.stack([torch.from_numpy((data[i : i + block_size]).astype(np.int64)) for i in offsets])
    y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + block_size]).astype(np.int64)) for i in offsets])
    return x, y


@pytest.fixture
def train_bin(tmp_path: Path) -> Path:
    """As nanoGPT's prepare.py writes it."""
    NUMBERS.astype(np.uint16).tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


def equal(one: Any, other: Any) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def epoch_of(dataset: Any, epoch: int, workers: int = 0) -> list[Any]:
    plan = Plan(7, len(dataset), 5)
    config = DataConfig(train=dataset, num_workers=workers, worker_start_method="spawn" if workers else "auto")
    loader = TrainLoader(dataset, plan, LoaderOptions(config, 7, torch.device("cpu")), micro_batch_size=5)
    first = epoch * plan.steps_per_epoch
    try:
        return [m.batch for work in loader.steps(first, first + 3) for m in work.micro_batches]
    finally:
        loader.close()


def test_windows_are_those_of_nanogpt_at_the_same_offsets(train_bin: Path) -> None:
    for stride in (None, 1, 7, 100):
        data = Tokens(train_bin, 32, stride=stride)
        indices = np.array([0, 3, len(data) - 1])
        expected = get_batch(train_bin, torch.from_numpy(indices * (stride or 32)), 32)
        assert equal(data.read_batch(indices), expected)
        assert equal(default_collate([data[int(index)] for index in indices]), expected)


def test_random_windows_are_nanogpt_s_draw_under_the_seeds_of_the_sample(train_bin: Path) -> None:
    data, plan = Tokens(train_bin, 32, random=True), Plan(7, 31, 5)
    assert len(data) == 31
    epochs = [epoch_of(data, epoch) for epoch in (0, 2)]
    for epoch, found in zip((0, 2), epochs, strict=True):
        for step, batch in enumerate(found, start=epoch * plan.steps_per_epoch):
            offsets = []
            for index in map(int, plan.batch(step)):
                seed_sample(7, epoch, index)
                offsets.append(torch.randint(len(NUMBERS) - 32, (1,)))
            assert equal(batch, get_batch(train_bin, torch.cat(offsets), 32))
    assert not equal(epochs[0][0], epochs[1][0])
    assert all(equal(*pair) for pair in zip(epoch_of(data, 0, workers=2), epochs[0], strict=True))


def test_random_windows_reach_both_ends() -> None:
    starts = {int(x[0]) for x, _ in (Tokens(np.arange(6), 3, random=True, samples=200)[k] for k in range(200))}
    assert starts == {0, 1, 2}


@given(total=st.integers(2, 60), length=st.integers(1, 20), stride=st.integers(1, 25))
def test_windows_cover_all_that_fits(total: int, length: int, stride: int) -> None:
    expected = [list(range(k, k + length + 1)) for k in range(0, total, stride) if k + length < total]
    if not expected:
        return
    data = Tokens(np.arange(total), length, stride=stride)
    assert [[*x.tolist(), int(y[-1])] for x, y in (data[index] for index in range(len(data)))] == expected
    whole = Tokens(np.arange(total), length)
    targets = [int(t) for k in range(len(whole)) for t in whole[k][1]]
    assert targets == list(range(1, len(targets) + 1)), "each token is a target once"
    assert total - 1 - len(targets) < length


@pytest.mark.parametrize("kind", ["npy", "uint32", "llm.c", "llm.c 32", "array", "tensor"])
def test_every_form_holds_the_same_tokens(tmp_path: Path, kind: str) -> None:
    path, options = tmp_path / ("t.npy" if kind == "npy" else "t.bin"), {}
    big = kind in ("uint32", "llm.c 32")
    numbers = NUMBERS + (100_000 if big else 0)
    given: Any = path
    if kind == "npy":
        np.save(path, NUMBERS.astype(np.uint16))
    elif kind == "uint32":
        numbers.astype(np.uint32).tofile(path)
        options = {"dtype": "uint32"}
    elif kind.startswith("llm.c"):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = [20240801 if big else 20240520, 1, len(numbers)]
        path.write_bytes(header.tobytes() + numbers.astype(np.uint32 if big else np.uint16).tobytes())
    else:
        given = NUMBERS if kind == "array" else torch.from_numpy(NUMBERS)
    data = Tokens(given, 9, **options)
    assert data[5][0].tolist() == numbers[45:54].tolist()
    assert len(data.tokens) == 1000


def test_only_the_windows_that_are_read_come_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.bin"
    with open(path, "wb") as file:
        file.truncate(1 << 36)  # 64 GiB, of which nothing is on the disk
    memory, faults = psutil.Process().memory_info().rss, _faults()
    data = Tokens(path, 1024)
    assert len(data) == ((1 << 35) - 1025) // 1024 + 1
    for index in range(0, len(data), len(data) // 100):
        assert data[index][0].sum() == 0
    data.read_batch(np.arange(0, len(data), len(data) // 64))
    assert _faults() - faults < 20_000, "all would be a million; a kernel that reclaims memory makes some thousand"
    assert psutil.Process().memory_info().rss - memory < 32 << 20
    assert len(pickle.dumps(data)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(data))[5][0], data[5][0])


def _faults() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_minflt + used.ru_majflt


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.bin", None, {}, "no file .*none.bin"),
        ("a.txt", b"x", {}, r"expected a \.bin or \.npy file"),
        ("a.bin", b"123", {}, "3 bytes, which are no uint16 numbers"),
        ("a.bin", b"123456", {"dtype": "uint32"}, "6 bytes, which are no uint32 numbers"),
        ("a.bin", b"", {}, "0 bytes"),
        ("a.bin", b"1234", {"dtype": "int8"}, "expected dtype to be uint16 or uint32, found 'int8'"),
        ("a.bin", b"12345678", {}, "expected at least 5 tokens for one window, found 4"),
        ("a.npy", b"12345678", {}, "can't be read"),
        (
            "a.bin",
            np.array([20240520, 1, 7] + [0] * 253, np.int32).tobytes() + b"12",
            {},
            "promises 7 tokens of uint16",
        ),
        ("a.bin", b"1" * 20, {"stride": 0}, "at least 1, found 4, 0 and None"),
        ("a.bin", b"1" * 20, {"random": True, "stride": 2}, "no stride"),
        ("a.bin", b"1" * 20, {"samples": 2}, "random: true"),
    ],
)
def test_what_holds_no_windows_is_refused(tmp_path: Path, name: str, content: Any, options: Any, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        Tokens(tmp_path / name, 4, **options)


def test_floats_and_tables_are_no_tokens() -> None:
    for wrong in (np.zeros(9), np.zeros((3, 3), dtype=int)):
        with pytest.raises(DataError, match="expected one row of whole numbers"):
            Tokens(wrong, 2)


DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13], [14, 15]]
JOINED = np.concatenate([[*document, 1] for document in DOCUMENTS])


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return len(DOCUMENTS)

    def __getitem__(self, index: int) -> Any:
        return {"ids": torch.tensor(DOCUMENTS[index], dtype=torch.int64), "text": "x"}


@pytest.mark.parametrize("kind", ["lists", "arrays", "generator", "dataset", "jsonl", "jsonl of dicts"])
@pytest.mark.parametrize("length", [2, 3, 5])
def test_packing_is_a_plain_concatenation(tmp_path: Path, kind: str, length: int) -> None:
    lines = DOCUMENTS if kind == "jsonl" else [{"ids": document} for document in DOCUMENTS]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    given = {
        "lists": DOCUMENTS, "arrays": [np.array(d, dtype=np.int64) for d in DOCUMENTS], "generator": (d for d in DOCUMENTS),
        "dataset": Dicts(),
    }.get(kind, tmp_path / "d.jsonl")  # fmt: skip
    data = PackedTokens(given, length, eos=1, column="ids")
    rows = (len(JOINED) - 1) // length
    assert len(data) == rows
    for index in range(rows):
        x, y = data[index]
        assert x.tolist() == JOINED[index * length : (index + 1) * length].tolist()
        assert y.tolist() == JOINED[index * length + 1 : (index + 1) * length + 1].tolist()
    assert data.tokens.dtype == np.uint16
    assert data.starts.tolist() == [0, 4, 6, 7, 13, 16]


def test_a_window_knows_its_documents() -> None:
    data = PackedTokens(DOCUMENTS, 3, eos=1)
    owners = np.concatenate([[number] * (len(document) + 1) for number, document in enumerate(DOCUMENTS)])
    for index in range(len(data)):
        held = owners[index * 3 : index * 3 + 4]
        assert list(data.documents_in(index)) == list(range(held[0], held[-1] + 1))
    with pytest.raises(DataError, match="random windows"):
        PackedTokens(DOCUMENTS, 3, eos=1, random=True).documents_in(0)


def test_documents_are_read_once_in_their_order() -> None:
    asked: list[int] = []

    class Counting(Dicts):
        def __getitem__(self, index: int) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    PackedTokens(Counting(), 3, eos=1, column="ids")
    assert asked == list(range(5))


def test_a_packed_file_holds_the_same_windows(tmp_path: Path) -> None:
    big = [*DOCUMENTS, [70_000, 3]]
    for name, documents in (("small.npy", DOCUMENTS), ("big.npy", big)):
        held = PackedTokens(documents, 3, eos=1)
        assert pack_tokens(documents, tmp_path / name, eos=1) == len(held.tokens)
        data = Tokens(tmp_path / name, 3)
        assert data.tokens.dtype == held.tokens.dtype == (np.uint32 if name == "big.npy" else np.uint16)
        assert equal(data.read_batch(np.arange(len(data))), held.read_batch(np.arange(len(held))))
        assert np.load((tmp_path / name).with_suffix(".index.npy")).tolist() == held.starts.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "big.index.npy",
        "big.npy",
        "small.index.npy",
        "small.npy",
    ]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[1], "text"], "document 1: expected a list of token numbers.*tokenize texts first"),
        ([[1.5]], "document 0: expected a list of token numbers, found float64"),
        ([[1, -2]], "document 0: tokens are numbers from 0"),
        ([[2**32]], "document 0: tokens are numbers from 0"),
        ([{"text": "x"}], "document 0 has no 'input_ids'; it has text: set column"),
        ([[1]], "expected at least 4 tokens for one window, found 2"),
        ([], "found 0"),
        ("none.jsonl", "no file none.jsonl"),
    ],
)
def test_what_cannot_be_packed_is_refused_by_place(documents: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        PackedTokens(documents, 3, eos=1)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("[1, 2]\n[3,\n")
    with pytest.raises(DataError, match=r"d\.jsonl:2: this line isn't JSON"):
        PackedTokens(tmp_path / "d.jsonl", 1, eos=0)
    with pytest.raises(DataError, match="eos: expected the number of a token, found -1"):
        PackedTokens([[1]], 1, eos=-1)
