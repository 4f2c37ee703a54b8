"""curves.png: drawn from whatever rows there are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_train.pages.curves import (
    averaged,
    best_point,
    brief,
    horizontal_of,
    judging,
    lower_is_better,
    metric_names,
    panel_of,
    series,
    thinned,
)
from dist_train.pages.png import draw_curves

TRAIN = [
    {
        "step": s,
        "epoch": 1,
        "samples": s,
        "split": "train",
        "loss": 2.0 / s,
        "lr": 0.1,
        "grad_norm": 1.0,
        "accuracy": 0.5,
    }
    for s in range(1, 60)
]
VAL = [{"step": s, "split": "val", "loss": 1.0 / s, "accuracy": 0.9, "raw_accuracy": 0.8} for s in range(10, 60, 10)]
TEST = [{"step": 59, "split": "test", "loss": 0.1, "accuracy": 0.95}]


def is_blank(path: Path) -> bool:
    return len(Image.open(path).convert("RGB").getcolors(1 << 24)) < 3


@pytest.mark.parametrize(
    ("rows", "panels"),
    [
        (TRAIN + VAL + TEST, 3),
        (TRAIN, 3),
        (TRAIN[:1], 3),
        ([], 2),
        ([{**row, "loss": math.nan} for row in TRAIN], 3),
        ([{"step": 1, "split": "train", "loss": math.inf}], 2),
        ([{"step": s, "split": "val", "loss": 1.0, **{f"m{i}": 0.1 for i in range(9)}} for s in (1, 2)], 6),
    ],
)
def test_any_rows_make_a_picture(tmp_path: Path, rows: list[dict[str, Any]], panels: int) -> None:
    path = tmp_path / "curves.png"
    draw_curves(rows, path, "a $name_ with {odd} \\letters \u6570")
    size = Image.open(path).size
    assert size[0] == pytest.approx(5.2 * 110 * min(3, panels), abs=4)
    assert not is_blank(path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_metrics_drawn_are_those_of_evaluations() -> None:
    assert metric_names(TRAIN + VAL + TEST) == ["accuracy"]
    assert metric_names(TRAIN) == ["accuracy"]
    assert metric_names([]) == []


def test_a_step_that_occurs_twice_is_drawn_once_as_the_later_row_has_it() -> None:
    rows = [{"step": step, "split": "train", "loss": loss} for step, loss in ((1, 1.0), (2, 2.0), (1, 3.0))]
    assert series(rows, "train", "loss") == ([1, 2], [3.0, 2.0])


@pytest.mark.parametrize("length", [100, 801, 10_000, 123_457])
def test_thinning_keeps_every_extreme_value_both_ends_and_the_order(length: int) -> None:
    values = [math.sin(k) for k in range(length)]
    values[length // 3], values[length // 2], values[length // 4] = 50.0, -50.0, math.nan
    steps, kept = thinned((list(range(length)), values))
    assert len(steps) <= max(length if length <= 800 else 0, 2 * 400 + 3)
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, length - 1)
    assert {length // 3, length // 2, length // 4} <= set(steps)
    assert all(value == values[step] or step == length // 4 for step, value in zip(steps, kept, strict=True))
    means = averaged((list(range(length)), values))
    assert (means is None) == (length <= 800)
    if means is not None:  # equal parts: their mean is that of all
        assert sum(means[1]) / 400 == pytest.approx(sum(v for v in values if v == v) / length, abs=1e-2)


def test_the_best_is_that_of_val_by_its_direction_and_of_equal_ones_that_with_the_lowest_loss() -> None:
    rows = [
        {"step": s, "split": "val", "loss": loss, "f1": f1} for s, loss, f1 in ((1, 3, 0.5), (2, 2, 0.9), (3, 1, 0.9))
    ]
    assert panel_of(TRAIN + rows, "loss", {}).lines[1].best == (3, 1.0)
    assert panel_of(TRAIN + rows, "loss", {}).lines[0].best is None
    assert panel_of(rows, "f1", {}).lines[0].best == (3, 0.9)
    assert panel_of(rows, "f1", {"checkpoint": {"keep_best": "min val/f1"}}).lines[0].best == (1, 0.5)
    said = judging(
        {}, [{"event": "start", "better": {"f1": "max"}}, {"event": "start", "better": {"f1": "min"}}, {"event": "end"}]
    )
    assert panel_of(rows, "f1", said).lines[0].best == (1, 0.5)
    assert [lower_is_better(name, said) for name in ("f1_cat", "raw_f1", "f12", "accuracy", "loss")] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert panel_of(TRAIN, "loss", {}).lines[0].best == (59, 2.0 / 59)
    assert best_point(([1, 2], [math.nan, math.nan]), True) is None


def test_epochs_are_read_off_the_rows_also_where_the_batch_size_changes() -> None:
    constant = [{"step": step, "epoch": -(-step // 19), "split": "train"} for step in range(5, 191, 5)]
    assert horizontal_of(constant).epochs == [(0, 0.0), (190, 10.0)]
    changed = [{"step": 10, "epoch": 1}, {"step": 20, "epoch": 2}, {"step": 25, "epoch": 3}, {"step": 30, "epoch": 4}]
    axis = horizontal_of(changed)
    assert axis.epochs == [(0, 0.0), (10, 1.0), (20, 2.0), (25, 3.0), (30, 4.0)]
    assert {text: at for at, text in axis.epoch_ticks()}["3"] == pytest.approx((25 - 10) / 20)
    assert horizontal_of([]).epochs == []


def test_marks_of_axes_are_short_round_and_inside() -> None:
    assert [brief(value) for value in (0.05, 12_000, 1.5e6, 2e-5, 100, 0)] == [
        "0.05",
        "12k",
        "1.5M",
        "2e-5",
        "100",
        "0",
    ]
    for values in ([1.0, 1.0], [0.0, 0.0], [-1e299, 1e299], [1e-9, 2e-9], [1e-4, 9.0], [1e-9, 1e290]):
        rows = [{"step": k + 1, "split": "val", "loss": value} for k, value in enumerate(values)]
        marks = panel_of(rows, "loss", {}).ticks()
        assert 2 <= len(marks) <= 20
        assert all(-1e-6 <= at <= 1 + 1e-6 for at, _ in marks)
        assert len({text for _, text in marks}) == len(marks)
