"""A network's inputs, feature maps, histograms and graph for TensorBoard.

Taken on rank 0 from the first micro-batch of a step, right before the model gets it. Training is bitwise identical with it
and without: the forward is a separate one, in eval mode, before the seeding of the step's own; gradients are read in an
optimizer hook that is registered only when asked for.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_train.config.fields import Duration, in_steps
from dist_train.models.layers import watch
from dist_train.models.transfer import match_modules
from dist_train.runtime.compiler import uncompiled
from dist_train.task.batch import first_rows
from dist_train.training.callbacks import Callback
from dist_train.training.due import NEVER
from dist_train.watch.control import next_multiple

if TYPE_CHECKING:
    from dist_train.config.schema_tracking import TrackingConfig
    from dist_train.evaluation.evaluate import Evaluator
    from dist_train.tracking.logger import Logger
    from dist_train.training.callbacks import Training

Array = np.ndarray[Any, Any]
MOST = 1 << 18  # values of one histogram; larger tensors are strided
GAP = 1  # pixels between the pictures of a grid


def image_modules(config: TrackingConfig, model: nn.Module) -> list[str]:
    """Names of the modules whose outputs `tracking.images` shows.

    Raises:
        ConfigError: the model has none of that name.
    """
    patterns = config.images.modules if config.images is not None else []
    return match_modules(model, patterns, "tracking.images.modules")


class Pictures(Callback):
    """Logs what `tracking.images`, `tracking.histograms` and `tracking.graph` ask for.

    Raises:
        ConfigError: `tracking.images.modules` names no module of the model.
    """

    def __init__(self, config: TrackingConfig, evaluator: Evaluator, logger: Logger) -> None:
        self.config, self.evaluator, self.logger = config, evaluator, logger
        self.modules = image_modules(config, evaluator.model)
        images = config.images.every if config.images is not None else None
        self._every = {"images": _Every(images), "histograms": _Every(config.histograms)}
        self._off: set[str] = set()
        self._rows: Any = None  # what was shown last, for the pictures at the end
        self._seen = -1  # the last step that was examined

    def on_start(self, trainer: Training) -> None:
        """From here on the gradients are seen before each update."""
        if self.config.histograms is None:
            return

        def before_update(*_: Any) -> None:
            self._seen = trainer.step
            if self._every["histograms"].due(trainer):
                self._try("histograms", self._show_histograms, trainer)

        self._try("histograms", trainer.optimizer.register_step_pre_hook, before_update)

    def on_batch(self, trainer: Training, batch: Any) -> None:
        """The first micro-batch of each step, on its way into the model."""
        images = self.config.images
        if (images is None and not self.config.graph) or self._seen == trainer.step:
            return
        self._seen = trainer.step
        if images is not None and self._every["images"].due(trainer):
            self._rows = first_rows(batch, images.samples)
            self._try("images", self._show_images, trainer)
        if self.config.graph and trainer.step == 0:
            self._try("graph", self._show_graph, trainer, batch)

    def on_end(self, trainer: Training) -> None:
        """Log the trained model's too."""
        if self._seen < 0 or trainer.outcome != "completed":
            return
        if self._rows is not None:
            self._try("images", self._show_images, trainer)
        if self.config.histograms is not None:
            self._try("histograms", self._show_histograms, trainer)

    def _try(self, key: str, show: Callable[..., object], *args: Any) -> None:
        """A missing picture is no reason to end a run."""
        try:
            if key not in self._off:
                show(*args)
        except Exception as error:
            self._off.add(key)
            text = "tracking.%s is off for the rest of this run: %s: %s"
            logging.getLogger("dist_train").warning(text, key, type(error).__name__, error)

    def _show_images(self, trainer: Training) -> None:
        """Run the batch through the model, in eval mode, and log what goes in and what the layers give."""
        shown: dict[str, list[Array]] = {}

        def show(name: str, values: Any, color: bool = False) -> None:
            shown[name] = pictures(values, color)  # copied now: the next layer may work in place

        def on_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for name, tensor in _named("inputs", kwargs or (args[0] if len(args) == 1 else args)):
                self._try(f"images of {name}", show, name, tensor, True)

        def on_layer(name: str, output: Any) -> None:
            if name in self.modules and f"features/{name}" not in shown:
                self._try(f"images of {name}", show, f"features/{name}", output)

        self._look(trainer, self._rows, on_inputs, on_layer)
        for name in self.modules:
            if f"features/{name}" not in shown:
                self._try(f"images of {name}", _not_called, name)
        for name, arrays in shown.items():
            for k, array in enumerate(arrays):
                self.logger.image(name if len(arrays) == 1 else f"{name}/{k}", trainer.step, array)

    def _look(
        self, trainer: Training, rows: Any, on_inputs: Callable[..., None], on_layer: Callable[..., None]
    ) -> None:
        """A forward in eval mode: `on_inputs` gets the model and what it is called with, `on_layer` each output with its name."""
        model, evaluator = self.evaluator.model, self.evaluator
        handle = model.register_forward_pre_hook(on_inputs, with_kwargs=True)
        try:
            with uncompiled(), evaluator.serving(ema=False), evaluator.precision.autocast():
                watch(model, lambda: evaluator.task.predict(model, rows), on_layer)
        finally:
            handle.remove()

    def _show_graph(self, trainer: Training, batch: Any) -> None:
        got: list[tuple[Any, ...]] = []
        self._look(trainer, first_rows(batch, 1), lambda _, args, kwargs: got.append(args), lambda name, output: None)
        inputs = got[0]
        if not inputs or not all(isinstance(part, Tensor) for part in inputs):
            raise ValueError("only a model whose inputs are tensors by position can be traced")
        on_cpu = copy.deepcopy(trainer.model).cpu().eval()  # traced in another thread: shares nothing with training
        self.logger.graph(on_cpu, tuple(part.cpu() for part in inputs))

    def _show_histograms(self, trainer: Training) -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                self.logger.histogram(f"weights/{name}", trainer.step, _values(parameter))
            if parameter.grad is not None:
                self.logger.histogram(f"gradients/{name}", trainer.step, _values(parameter.grad))


def _not_called(name: str) -> None:
    raise LookupError(f"the model's forward doesn't call {name}")


class _Every:
    """When something is due on rank 0 alone: nobody has to agree, so a duration in time is measured by its own clock."""

    def __init__(self, every: Duration | None) -> None:
        self.every = every
        self._next: float | None = None

    def due(self, trainer: Training) -> bool:
        """Whether something is due; called once per step, before it."""
        every, now = self.every, trainer.seconds
        if every is None or not every.is_time:
            return trainer.step % (in_steps(every, trainer.plan.steps_per_epoch) or NEVER) == 0
        if self._next is None:
            self._next = next_multiple(now, every.value)
        is_due = now >= self._next
        if is_due:
            self._next = next_multiple(now, every.value)
        return is_due or trainer.step == 0


def _named(name: str, inputs: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a model's inputs: `inputs`, `inputs/0`, `inputs/image`."""
    if isinstance(inputs, Tensor):
        yield name, inputs
    elif isinstance(inputs, Mapping | list | tuple):
        for key, item in inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs):
            yield from _named(f"{name}/{key}", item)


@torch.no_grad()
def pictures(values: Tensor, color: bool = False) -> list[Array]:
    """uint8 pictures (H, W) or (H, W, 3) of a batch.

    Args:
        values: (N, F) makes one picture, one row per sample. (N, C, H, W) makes one per sample, a grid of its channels, each
            scaled from its smallest value (black) to its largest (white); (N, C, L) one per sample, one row per channel.
        color: they are inputs: with 1 or 3 channels, or none, (N, H, W), they are one grid of N pictures, as they are
            where they lie in [0, 1], else scaled together.

    Raises:
        ValueError: any other shape.
    """
    if not isinstance(values, Tensor) or values.dim() not in (2, 3, 4) or not values.numel():
        found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"no picture can be made of {found}")
    if values.dim() == 2:
        return [_stretch(values, (0, 1)).cpu().numpy()]
    if values.dim() == 3:
        values = values[:, None]
    if color and values.shape[1] in (1, 3):
        if values.dtype != torch.uint8:
            inside = bool((values >= 0).all() & (values <= 1).all())
            values = (values * 255).round().byte() if inside else _stretch(values, (0, 1, 2, 3))
        return [_grid(values.permute(0, 2, 3, 1).squeeze(-1).cpu().numpy())]
    return [_grid(maps) for maps in _stretch(values, (2, 3)).cpu().numpy()]


def _stretch(values: Tensor, over: tuple[int, ...]) -> Tensor:
    """Least value to 0, largest to 255, over some dimensions; what is the same everywhere is 0."""
    values = values.float().nan_to_num()
    low, high = values.amin(over, keepdim=True), values.amax(over, keepdim=True)
    return ((values - low) / (high - low).clamp(min=1e-12) * 255).round().byte()


def _grid(parts: Array) -> Array:
    """(n, H, W) or (n, H, W, 3) pictures side by side, nearly a square of them, with white lines between."""
    columns = math.ceil(math.sqrt(len(parts)))
    rows = -(-len(parts) // columns)
    height, width = parts.shape[1] + GAP, parts.shape[2] + GAP
    whole = np.full((rows * height - GAP, columns * width - GAP, *parts.shape[3:]), 255, np.uint8)
    for k, part in enumerate(parts):
        y, x = k // columns * height, k % columns * width
        whole[y : y + height - GAP, x : x + width - GAP] = part
    return whole


def _values(tensor: Tensor) -> Array:
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-flat.numel() // MOST) or 1].to("cpu", torch.float32, copy=True).numpy()
