"""`map` is torchmetrics' mean average precision, with the names of the dataset's classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dist_train.task.entries import MetricEntry, build_metric

pytest.importorskip("pycocotools", reason="needs pip install -e '.[zoo]'")
NONE = torch.zeros(0, dtype=torch.float64)


def detections(images: int, labels: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """Boxes of the targets, found again a little off, and some that aren't there."""
    random = torch.Generator().manual_seed(1)
    outputs, targets = [], []
    for _ in range(images):
        corner, size = torch.rand(4, 2, generator=random) * 80, 8 + torch.rand(4, 2, generator=random) * 20
        boxes = torch.cat([corner, corner + size], dim=1)
        kinds = torch.tensor(labels)[torch.randint(len(labels), (4,), generator=random)]
        targets.append({"boxes": boxes[:3], "labels": kinds[:3], "image_id": 1})
        moved = boxes + torch.rand(4, 4, generator=random) * 3
        outputs.append({"boxes": moved, "labels": kinds, "scores": torch.rand(4, generator=random)})
    return outputs, targets


def values(
    metric: MetricEntry, outputs: list[Any], targets: list[Any], classes: tuple[str, ...] = ()
) -> dict[str, float]:
    metric.reset()
    for part in (slice(0, 1), slice(1, 7), slice(7, None)):
        metric.update(tuple(outputs[part]), tuple(targets[part]))
    return metric.results(NONE, classes)


def test_map_is_torchmetrics() -> None:
    from torchmetrics.detection import MeanAveragePrecision

    outputs, targets = detections(20, (1, 2, 4))
    reference = MeanAveragePrecision(class_metrics=True)
    reference.update(outputs, targets)
    expected = {name: value.tolist() for name, value in reference.compute().items()}
    assert expected["classes"] == [1, 2, 4]
    assert 0.1 < expected["map"] < 0.9
    plain, each = build_metric("map", None), build_metric({"metric": "map", "per_class": True, "name": "det"}, None)
    totals = {name: expected[name] for name in ("map", "map_50", "map_75")}
    assert values(plain, outputs, targets) == pytest.approx(totals)
    found = values(each, outputs, targets)
    assert [found.pop(f"det{name}") for name in ("", "_50", "_75")] == pytest.approx([*totals.values()])
    areas = dict(zip((1, 2, 4), expected["map_per_class"], strict=True))
    assert found == pytest.approx({f"det_ap_{label}": area for label, area in areas.items()})
    raw = build_metric({"_target_": "torchmetrics.detection.MeanAveragePrecision", "class_metrics": True}, None)
    found = values(raw, outputs, targets)
    assert [found[f"map_per_class_{label}"] for label in areas] == pytest.approx([*areas.values()])
    assert found["mar_100"] == pytest.approx(expected["mar_100"])
    assert "classes" not in found


@pytest.mark.parametrize(
    ("labels", "classes", "names"),
    [
        ((1, 2), ("__background__", "cat", "sea lion"), ["ap_cat", "ap_sea_lion"]),
        ((0, 1), ("cat", "dog"), ["ap_cat", "ap_dog"]),
        ((1, 2), ("cat", "dog"), ["ap_1", "ap_2"]),  # from 1: which class a label is isn't known
        ((0, 5), ("cat", "dog"), ["ap_cat", "ap_5"]),
    ],
)
def test_labels_have_names_only_where_they_are_known(
    labels: tuple[int, ...], classes: tuple[str, ...], names: list[str]
) -> None:
    each = build_metric({"metric": "map", "per_class": True}, None)
    assert [*values(each, *detections(12, labels), classes)][3:] == names


def test_without_any_box_it_is_nan() -> None:
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    found = values(build_metric("map", None), [{**empty, "scores": torch.zeros(0)}] * 8, [empty] * 8)
    assert [*found] == ["map", "map_50", "map_75"]
    assert all(map(math.isnan, found.values()))
