"""curves.png: drawn from whatever rows there are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_train.views.curves import draw_curves, metric_names, series

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


def test_a_step_that_occurs_twice_is_drawn_once_and_long_series_are_thinned_but_end_where_they_end() -> None:
    rows = [{"step": s, "split": "train", "loss": float(s)} for s in [*range(10_000), 5000]]
    steps, values = series(rows, "train", "loss")
    assert len(steps) == len(set(steps)) <= 1500
    assert (steps[-1], values[-1]) == (9999, 9999.0)
