"""Predictions of any task in each format: the numbers that the task gives, a row for each sample, or a refusal by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROGRAMS
from torch.nn import functional

import dist_train
from dist_train.config.errors import ConfigError
from dist_train.data import Digits
from dist_train.evaluation.predict import rows_of
from dist_train.main import main


@pytest.fixture(autouse=True)
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PROGRAMS))


@pytest.fixture(scope="module")
def logits(digits: Path) -> torch.Tensor:
    with torch.no_grad():
        return dist_train.load(digits)(images())


def images() -> torch.Tensor:
    return Digits("test", flat=True).inputs


def predicted(run: Path, folder: Path, form: str, task: str, *options: str) -> Any:
    """What the file holds, read by that format's own reader."""
    path = folder / f"out.{form}"
    assert main(["predict", str(run), "--output", str(path), f"task._target_=answers.{task}", *options]) == 0
    if form == "pt":
        return torch.load(path, weights_only=True)
    if form == "jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if form == "parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_boxes_are_nested_lists_of_any_length(digits: Path, tmp_path: Path) -> None:
    from answers import boxes_of

    rows = predicted(digits, tmp_path, "jsonl", "Boxes")
    assert [row["index"] for row in rows] == list(range(360))
    assert {len(row["boxes"]) for row in rows} == {0, 1, 2}
    targets = Digits("test", flat=True).targets
    assert targets is not None
    for row, image, target in zip(rows, images(), targets.tolist(), strict=True):
        expected = boxes_of(image)
        torch.testing.assert_close(torch.tensor(row["boxes"]).view(-1, 4), expected["boxes"], rtol=0, atol=0)
        assert (row["labels"], row["says"]) == (expected["labels"].tolist(), expected["says"])
        assert row["target"] == target
    stored = predicted(digits, tmp_path, "pt", "Boxes")
    assert torch.equal(torch.cat(stored["boxes"]), torch.cat([boxes_of(image)["boxes"] for image in images()]))
    assert stored["says"] == [row["says"] for row in rows]
    assert torch.equal(stored["target"], targets)
    assert (tmp_path / "out.pt").stat().st_size < 400_000, "views are stored with all that they are views of"


def test_any_number_of_processes_writes_the_same_bytes_of_any_task(
    digits: Path, together: Path, tmp_path: Path
) -> None:
    predicted(digits, tmp_path, "jsonl", "Boxes")
    predicted(digits, tmp_path, "csv", "Pairs", "--raw")
    for processes in ("2", "3"):
        assert (together / processes / "boxes.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
        assert (together / processes / "pairs.csv").read_bytes() == (tmp_path / "out.csv").read_bytes()


def test_masks_are_the_most_likely_class_of_each_pixel(digits: Path, tmp_path: Path) -> None:
    expected = (images().view(-1, 8, 8) < 0.25).long()
    stored = predicted(digits, tmp_path, "pt", "Masks")
    assert torch.equal(stored["prediction"], expected)
    assert set(stored) == {"prediction", "target"}
    assert [row["prediction"] for row in predicted(digits, tmp_path, "jsonl", "Masks")] == expected.tolist()
    raw = predicted(digits, tmp_path, "pt", "Masks", "--raw")
    assert raw["output"].shape == (360, 2, 8, 8)
    assert torch.equal(raw["output"][:, 0], images().view(-1, 8, 8))


def test_tokens_may_differ_in_number_between_batches(
    digits: Path, tmp_path: Path, logits: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = predicted(digits, tmp_path, "jsonl", "Tokens")
    best = logits.argmax(1).tolist()
    assert [row["prediction"] for row in rows] == [[k] * (4 if i < 350 else 3) for i, k in enumerate(best)]
    stored = predicted(digits, tmp_path, "pt", "Tokens")
    assert [entry.tolist() for entry in stored["prediction"]] == [row["prediction"] for row in rows]
    path = tmp_path / "tokens.csv"
    assert main(["predict", str(digits), "--output", str(path), "task._target_=answers.Tokens"]) == 2
    assert "eval batches differ in prediction_3: use --format jsonl" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir() if "tokens" in file.name] == []


def test_several_outputs_are_columns_of_their_names(
    digits: Path, tmp_path: Path, logits: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = predicted(digits, tmp_path, "pt", "Pairs")
    assert capsys.readouterr().err.count("note: left out, without a row for each sample: loss, cache\n") == 1
    assert list(stored) == ["logits", "inner_0", "inner_1", "target"]
    torch.testing.assert_close(stored["logits"], logits)
    assert torch.equal(stored["inner_0"], stored["logits"].argmax(1))
    assert torch.equal(stored["inner_1"], functional.normalize(stored["logits"]).bfloat16().float())
    (first, *_) = predicted(digits, tmp_path, "csv", "Pairs")
    assert list(first) == [
        "index", *(f"logits_{k}" for k in range(10)), "inner_0", *(f"inner_1_{k}" for k in range(10)), "target"
    ]  # fmt: skip
    assert torch.tensor([float(first[f"logits_{k}"]) for k in range(10)]).equal(stored["logits"][0])


@pytest.mark.parametrize("task", ["Boxes", "Masks", "Tokens", "Pairs"])
def test_parquet_holds_what_json_lines_hold(digits: Path, tmp_path: Path, task: str) -> None:
    pytest.importorskip("pyarrow", reason="needs pip install -e '.[parquet]'")
    rows = predicted(digits, tmp_path, "parquet", task)
    lines = predicted(digits, tmp_path, "jsonl", task)
    assert len(rows) == 360
    as_float32 = [
        json.loads(json.dumps(row), parse_float=lambda text: float(torch.tensor(float(text)))) for row in lines
    ]
    assert rows == as_float32


def test_raw_leaves_the_outputs_of_a_classifier_as_they_are(digits: Path, tmp_path: Path, logits: torch.Tensor) -> None:
    path = tmp_path / "raw.jsonl"
    assert main(["predict", str(digits), "--raw", "--output", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(rows[0]) == ["index", "output", "target"]
    torch.testing.assert_close(torch.tensor([row["output"] for row in rows]), logits)
    named = tmp_path / "named"
    assert main(["predict", str(digits), "--format", "jsonl", "--output", str(named)]) == 0
    first = json.loads(named.read_text().splitlines()[0])
    assert list(first) == ["index", "prediction", "prediction_name", "probability", "target", "target_name"]
    assert len(first["probability"]) == 10


def test_raw_has_all_that_a_model_gives_beside_its_logits(digits: Path, tmp_path: Path, logits: torch.Tensor) -> None:
    """Of which a loss of torch's takes the logits alone."""
    raw, plain = tmp_path / "raw.pt", tmp_path / "plain.jsonl"
    model = "model={_target_: answers.Embedding, in_features: 64, hidden: [128], out_features: 10}"
    assert main(["predict", str(digits), "--raw", "--output", str(raw), model]) == 0
    stored = torch.load(raw, weights_only=True)
    assert list(stored) == ["logits", "emb", "target"]
    torch.testing.assert_close(stored["logits"], logits)
    net = dist_train.load(digits)
    *_, head = [part for part in net.modules() if isinstance(part, torch.nn.Linear)]
    torch.testing.assert_close(head(stored["emb"]).detach(), logits)
    assert main(["predict", str(digits), "--output", str(plain), model]) == 0
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    assert list(rows[0]) == ["index", "prediction", "prediction_name", "probability", "target", "target_name"]
    assert [row["prediction"] for row in rows] == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("form", "task", "message"),
    [
        ("csv", "Masks", "the task's prediction is (n, 8, 8): use --format jsonl, parquet or pt"),
        ("csv", "Boxes", "the task's boxes is tensors of any size: use --format jsonl, parquet or pt"),
        ("jsonl", "Diverged", "holds inf or nan, which JSON has no word for: use --format pt or parquet"),
        ("csv", "Transposed", "in output there is a tensor of shape (10, 50)"),
        ("pt", "Heads", "there is a list of 2; several outputs are a tuple or a mapping"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, task: str, message: str
) -> None:
    path = tmp_path / f"out.{form}"
    assert main(["predict", str(digits), "--output", str(path), f"task._target_=answers.{task}"]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_text_need_a_name(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(digits), "--format", "pt"]) == 2
    assert "pt can't be printed: give --output FILE.pt" in capsys.readouterr().err


def test_without_pyarrow_parquet_is_refused_with_the_command_that_installs_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["predict", str(digits), "--output", str(tmp_path / "out.parquet")]) == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_what_might_be_either_is_refused() -> None:
    two = torch.zeros(2, 3)
    assert list(rows_of((two, {"a": two}), 2).columns) == ["output_0", "output_1.a"]
    assert list(rows_of([torch.zeros(3), torch.zeros(4)], 2).columns) == ["output"]
    assert rows_of([[1, 2], []], 2).columns["output"][1].dtype == torch.int64
    assert [tuple(item.shape) for item in rows_of([two, two], 2).columns["output"]] == [(2, 3)] * 2, (
        "an item per sample"
    )
    with pytest.raises(ConfigError, match="item 0 holds a, item 1 b"):
        rows_of([{"a": 1}, {"b": 1}], 2)
    with pytest.raises(ConfigError, match="of a sample there is a object"):
        rows_of([object(), object()], 2)
    with pytest.raises(ConfigError, match="there is none in"):
        rows_of({"loss": torch.tensor(1.0)}, 2)
