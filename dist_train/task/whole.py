"""Metrics that can't be summed: rank 0 gets the outputs of every batch, so that the value is that of a single process."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.task.batch import shapes_of, squeeze_column
from dist_train.task.metrics import Metric
from dist_train.task.task import modules_in

SUM_TOLERANCE = 2e-3  # of the probabilities of a sample, which sum to 1


class NonDecomposable(Metric):
    """A class with `update(outputs, targets)`, `compute` and `reset`, such as all of torchmetrics.

    It is recorded under its class's name in snake case (`multiclass_f1_score`), those of a MetricCollection under their keys.

    Attributes:
        members: the metrics inside, by name; one of torchmetrics may give more names, which only its result shows.
    """

    size = 0

    def __init__(self, metric: Any):
        self.metric = metric
        for found in modules_in(metric).values():
            for part in found.modules() if isinstance(found, nn.Module) else ():
                part.distributed_available_fn = lambda: False  # type: ignore[assignment]  # rank 0 computes alone
        snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(metric).__name__).lower()
        self.members: dict[str, Any] = dict(metric.items()) if isinstance(metric, nn.ModuleDict) else {snake: metric}
        self.name = next(iter(self.members))

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch; (N, 1) is passed as (N,)."""
        self.metric.update(*(squeeze_column(v) if isinstance(v, Tensor) else v for v in (outputs, targets)))

    def compute(self) -> Any:
        """The value over all batches: as `Metric.result` gives it."""
        value = self.metric.compute()
        if not isinstance(value, Mapping) or "classes" not in value or "map_per_class" not in value:
            return value
        # torchmetrics' detection: a vector of the labels that occurred, and their values, -1 where they aren't asked for
        labels = value["classes"].reshape(-1).tolist()
        per_class = {key for key in value if key.endswith("_per_class")}
        wanted = per_class if getattr(self.metric, "class_metrics", True) else ()
        by_label = {key: dict(zip(labels, value[key].reshape(-1).tolist(), strict=True)) for key in wanted}
        return {key: number for key, number in value.items() if key not in (*per_class, "classes")} | by_label


class AUROC:
    """Area under the ROC curve, as scikit-learn's roc_auc_score, from the scores of all samples.

    Outputs (N,), (N, 1): a score of the second class, in any scale. (N, classes): logits, log-probabilities or probabilities;
    of two classes the second one's, of more the mean over the areas of each class against the rest.

    Args:
        average: `macro`, or `none` for each class's area.
        ignore_index: samples with this target don't count.
    """

    higher_is_better = True

    def __init__(self, average: str = "macro", ignore_index: int = -100):
        if average not in ("macro", "none"):
            raise ValueError(f"expected average: macro or none, found {average!r}")
        self.average, self.ignore_index = average, ignore_index
        self._seen: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        """Forget all samples."""
        self._seen = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: scores (N,) or (N, classes), class numbers (N,)."""
        if outputs.dim() not in (1, 2) or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"expected scores of shape (N,) or (N, classes) and class numbers (N,), got {shapes_of(outputs)} and "
                f"{shapes_of(targets)}; for several labels per sample use torchmetrics.classification.MultilabelAUROC"
            )
        kept = targets != self.ignore_index
        self._seen.append((outputs[kept].double(), targets[kept].round().long()))

    def compute(self) -> Any:
        """The area; nan where a class or all others have no sample, which the mean leaves out."""
        outputs, targets = (torch.cat(part) for part in zip(*self._seen, strict=True))
        classes = outputs.shape[1] if outputs.dim() == 2 else 2
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            found = f"{int(targets.min())} ... {int(targets.max())}"
            raise ValueError(f"expected class numbers from 0 to {classes - 1}, or ignore_index, found {found}")
        if outputs.dim() == 1:
            return _area(outputs, targets)
        likely = bool(((outputs >= 0) & (outputs <= 1)).all())  # as torchmetrics reads them
        scores = outputs if likely else outputs.softmax(1)
        if classes == 2 and self.average == "macro":
            return _area(scores[:, 1], targets)
        areas = torch.tensor([_area(scores[:, k], (targets == k).long()) for k in range(classes)], dtype=torch.float64)
        return areas if self.average == "none" else areas.nanmean()


def _area(scores: Tensor, positive: Tensor) -> float:
    """How often a positive has a higher score than a negative, equal ones by half (Mann-Whitney's U): that is the area.

    By counts of equal scores in float64; importing scikit-learn for it would take seconds at the start.
    """
    if scores.isnan().any():
        return float("nan")
    values, place = scores.unique(return_inverse=True)
    hits, misses = (torch.bincount(place[positive == k], minlength=len(values)).double() for k in (1, 0))
    lower = misses.cumsum(0) - misses / 2
    return float((hits @ lower) / (hits.sum() * misses.sum()))


class MAP:
    """Mean average precision of detections, by torchmetrics: `map` (COCO's, over IoU 0.5 to 0.95), `map_50`, `map_75`.

    Outputs and targets are those of torchvision: for each image a dict with boxes (x1, y1, x2, y2) and labels, of outputs also
    scores.

    Args:
        per_class: `ap_<class>` too, of each label that occurs.
        iou_type: `bbox` or `segm`.

    Raises:
        ModuleNotFoundError: a package is missing; says how it is installed.
    """

    higher_is_better = True

    def __init__(self, per_class: bool = False, iou_type: str = "bbox"):
        coco = [name for name in ("pycocotools", "faster_coco_eval") if importlib.util.find_spec(name)]
        lacking = [] if importlib.util.find_spec("torchmetrics") else ["torchmetrics"]
        lacking += [] if coco else ["pycocotools"]
        if lacking:
            also = "" if coco else " (faster-coco-eval does instead of pycocotools)"
            raise ModuleNotFoundError(f"map needs {' and '.join(lacking)}: pip install {' '.join(lacking)}{also}")
        from torchmetrics.detection import MeanAveragePrecision

        kinds: Any = {"iou_type": iou_type, "backend": coco[0], "class_metrics": per_class}
        self.per_class = per_class
        self.metric = MeanAveragePrecision(**kinds)
        self.metric.warn_on_many_detections = False

    def reset(self) -> None:
        """Forget all images."""
        self.metric.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        """Add the images of a batch: lists of dicts."""
        self.metric.update(list(outputs), list(targets))

    def compute(self) -> dict[str, Any]:
        """nan where nothing of it occurs, which torchmetrics gives as -1."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = self.metric.compute()
        found: dict[str, Any] = {key: _area_or_nan(float(value[key])) for key in ("map", "map_50", "map_75")}
        if self.per_class:
            areas = map(_area_or_nan, value["map_per_class"].reshape(-1).tolist())
            found["ap"] = dict(zip(value["classes"].reshape(-1).tolist(), areas, strict=False))
        return found


def _area_or_nan(value: float) -> float:
    return value if value >= 0 else float("nan")
