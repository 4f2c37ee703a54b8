"""How fast training is, beside what the device could do, and whether it waits for its data: for train rows and the console."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dist_train.building.unsaved import NoCollectives, training_forward
from dist_train.models.flops import peak_flops, training_flops
from dist_train.runtime.seeding import undisturbed_generators
from dist_train.training.input_advice import InputFacts, advice
from dist_train.training.parts import losses_of

if TYPE_CHECKING:
    from dist_train.training.parts import Parts

# Training waits for data if each of so many log intervals, of so many seconds together, has had this share of waiting.
WAITING, INTERVALS, SECONDS = 0.2, 3, 2.0


def device_name(device: torch.device) -> str | None:
    """What a GPU is called; None for the CPU, whose peak depends on clocks and vector units."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


class Meter:
    """What rank 0 adds to train rows and says about speed; all of it at log intervals or before the first step.

    Args:
        note: prints a line.
    """

    def __init__(self, parts: Parts, note: Callable[[str], object]):
        self.parts, self.note = parts, note
        self.needed = parts.world.is_main  # the first micro-batch of this start
        self.flops = self.peak = 0.0  # of a sample in training; of all devices, in a second; 0 where not known
        self._waits: deque[tuple[float, float]] = deque(maxlen=INTERVALS)
        self._since = time.monotonic()
        self._advised = False
        self.facts: InputFacts | None = None  # of the first micro-batch; on rank 0, which gives the advice

    def look(self, batch: Any, samples: int) -> None:
        """At the first micro-batch, as the model gets it: count the operations of its `samples`, if the device's peak is known.

        A forward of its own, in eval mode, that changes nothing; on rank 0 alone, so a collective inside ends it.
        """
        self.needed = False
        parts = self.parts
        self.facts = InputFacts.of(parts, batch)
        if (name := device_name(parts.world.device)) is None:
            return
        precision = self._precision()
        if (peak := peak_flops(name, precision)) is None:
            self.note(f"no mfu: the peak FLOP/s of {name} in {precision} isn't known here")
            return
        if losses_of(parts):
            self.note("no mfu: of several optimizers with losses of their own the operations of a step aren't counted")
            return
        try:
            with undisturbed_generators(parts.world.device), parts.evaluator.serving(ema=False), NoCollectives():
                counted = training_flops(parts.model, lambda: training_forward(parts, batch))
            self.flops, self.peak = counted / samples, peak * parts.world.size
        except Exception as error:  # whatever is wrong with the model shows in training
            self.note(f"no mfu: its operations couldn't be counted ({type(error).__name__}: {error})")

    def _precision(self) -> str:
        """What the products are computed in."""
        name = self.parts.precision.name
        if name != "fp32":
            return name
        convolves = any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in self.parts.model.modules())
        tf32 = torch.get_float32_matmul_precision() != "highest" or (convolves and torch.backends.cudnn.allow_tf32)
        return "tf32" if tf32 else "fp32"

    def row(self, row: dict[str, float]) -> dict[str, float]:
        """What a train row gets beside `samples_per_s` and `data_wait`; no wait for the device.

        `peak_memory`: GiB that rank 0's tensors have taken on its GPU at most, in this start. `mfu`: operations of the model per
        second over the peak of all devices.
        """
        world, added = self.parts.world, dict[str, float]()
        now = time.monotonic()
        self._waits.append((row["data_wait"], now - self._since))
        self._since = now
        if world.device.type == "cuda":
            added["peak_memory"] = torch.cuda.max_memory_allocated(world.device) / 2**30
        if self.flops:
            added["mfu"] = row["samples_per_s"] * self.flops / self.peak
        return added

    def advice(self) -> str:
        """Once a start, if the input is the bottleneck: how much it costs and what to change; else ""."""
        waits, seconds = zip(*self._waits, strict=True) if self._waits else ((), ())
        if (
            self.facts is None
            or self._advised
            or len(waits) < INTERVALS
            or min(waits) < WAITING
            or sum(seconds) < SECONDS
        ):
            return ""
        self._advised = True
        share = sum(wait * second for wait, second in self._waits) / sum(seconds)
        return advice(share, self.facts)
