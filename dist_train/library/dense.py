"""Segmentation and detection, as torchvision's references train them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_train.task.batch import call_model, in_full_precision, is_pair, shapes_of, split_batch
from dist_train.task.losses import Loss
from dist_train.task.task import full_precision
from dist_train.task.terms import StepOutput


class Segmentation:
    """Cross-entropy of each pixel's class: a mean over the pixels that count, or over their class weights.

    A batch is (images, masks): whatever the model takes, and class numbers (N, H, W), int64. The model gives logits
    (N, classes, H, W), or a dict with `out` and `aux` (torchvision's, an auxiliary head after an earlier layer: FCN, Long et
    al. 2015; PSPNet, Zhao et al. 2017) or with `logits` (transformers). Logits of another size than the masks are resized
    (bilinear). A model with `aux` has two named losses, out + aux_weight * aux. The outputs for metrics are the logits and the
    masks; `predict` returns the logits.

    Args:
        ignore_index: pixels that don't count, in metrics by name either.
        aux_weight: of the auxiliary output's loss.
        class_weights: one for each class.
    """

    classes_dim = 1  # of what `predict` returns: see `evaluation.meaning`

    def __init__(self, ignore_index: int = 255, aux_weight: float = 0.5, class_weights: Tensor | None = None):
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index
        self.entropy = Loss(nn.CrossEntropyLoss(weight=class_weights, ignore_index=ignore_index))

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """The loss of a batch, summed over pixels.

        Raises:
            ValueError, TypeError: the batch isn't (images, masks), or the model gives no logits for their pixels.
        """
        images, masks = split_batch(batch)
        outputs = call_model(model, images)
        logits = _segments(outputs, masks.shape[-2:])
        with full_precision(logits):
            total, weight = self.entropy(logits, masks)
            if not isinstance(outputs, Mapping) or "aux" not in outputs:
                return StepOutput(total, weight, logits, masks)
            aux, _ = self.entropy(_resized(outputs["aux"], masks.shape[-2:]), masks)
        return StepOutput({"out": total, "aux": (aux, weight, self.aux_weight)}, weight, logits, masks)

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits (N, classes, H, W); the batch may be the images alone."""
        images, masks = split_batch(batch) if is_pair(batch) else (batch, None)
        size = images.shape[-2:] if isinstance(images, Tensor) else None if masks is None else masks.shape[-2:]
        return _segments(call_model(model, images), size)


def _segments(outputs: Any, size: torch.Size | None) -> Tensor:
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("out", outputs.get("logits"))
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise TypeError(
            "expected the model to return logits (N, classes, H, W), or a dict with them as `out` (and `aux`) or `logits`; found "
            f"{shapes_of(outputs)}"
        )
    return _resized(found, size)


def _resized(logits: Tensor, size: torch.Size | None) -> Tensor:
    if size is None or logits.shape[-2:] == size:
        return logits
    return functional.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


class Detection:
    """The losses of torchvision's detectors (Faster and Mask R-CNN, RetinaNet, FCOS, SSD), which compute them themselves.

    A batch is (images, targets): a list of tensors (C, H, W) and a list of dicts with `boxes` (n, 4) as x1, y1, x2, y2 in pixels
    and `labels` (n,), as `data.collate: {_target_: dist_train.data.collate_lists}` makes it of samples (image, target). In train
    mode `model(images, targets)` gives a dict of losses, the named losses here, whose sum is minimized; in eval mode
    `model(images)` gives a list of dicts with boxes, labels and scores: the outputs for metrics (`map`) and of `predict`.

    Each loss is the model's own mean over the boxes or anchors that it has sampled in a micro-batch, and is averaged over
    micro-batches and ranks by their number of images, as in torchvision's references with DDP. It isn't exactly that of one
    unsplit batch, where images have different numbers of boxes.

    Args:
        val_losses: compute the losses in evaluation too, by a second forward in train mode, in which norm layers and dropout
            stay in eval mode. Without it the loss of an evaluation is null: monitor `map`.
    """

    def __init__(self, val_losses: bool = True):
        self.val_losses = val_losses

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """The named losses of a batch, each times the number of images.

        Raises:
            ValueError, TypeError: the batch isn't (images, targets), or the model gives no dict of losses.
        """
        images, targets = _images(batch)
        with contextlib.nullcontext() if model.training else _losses_in_eval_mode(model):
            losses = model(images, targets)
        if not isinstance(losses, Mapping) or not all(isinstance(loss, Tensor) for loss in losses.values()):
            raise TypeError(
                "a Detection task expects that model(images, targets) gives a dict of losses in train mode, as torchvision's "
                f"detectors; found {shapes_of(losses)}"
            )
        count = len(images)
        return StepOutput({name: in_full_precision(loss) * count for name, loss in losses.items()}, count)

    def evaluate(self, model: nn.Module, batch: Any) -> StepOutput:
        """Detections, and the losses where they are asked for. Raises as `step`."""
        images, targets = _images(batch)
        detections = in_full_precision(model(list(images)))
        done = self.step(model, batch) if self.val_losses else StepOutput(images[0].new_zeros(()), 0)
        return StepOutput(done.loss, done.weight, detections, targets)

    def predict(self, model: nn.Module, batch: Any) -> list[dict[str, Tensor]]:
        """For each image a dict with boxes, labels and scores; the batch may be the images alone."""
        return model(list(batch[0] if is_pair(batch) and not isinstance(batch[1], Tensor) else batch))


def _images(batch: Any) -> tuple[list[Tensor], list[Any]]:
    images, targets = split_batch(batch)
    if isinstance(targets, Tensor | Mapping) or not all(isinstance(target, Mapping) for target in targets):
        raise ValueError(
            "a Detection task expects a batch of (list of images, list of dicts with boxes and labels), found "
            f"{shapes_of(batch)}; set data.collate to {{_target_: dist_train.data.collate_lists}}"
        )
    return list(images), list(targets)


@contextlib.contextmanager
def _losses_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Train mode for what chooses between losses and detections, but not for layers that then compute something else."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = not _differs_in_training(module)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _differs_in_training(module: nn.Module) -> bool:
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return isinstance(module, kinds) or type(module).__name__ in ("StochasticDepth", "DropPath")
