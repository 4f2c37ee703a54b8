"""The step on CUDA without a GPU: under fake tensors that claim to be there, nothing in it may make the host wait."""

from __future__ import annotations

import collections
import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_train.config.schema import TrainerConfig
from dist_train.data import (
    CutMix,
    Cutout,
    Mixup,
    OneOf,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomShift,
    RandomVerticalFlip,
)
from dist_train.data.augment import Augmentation
from dist_train.data.normalize import Normalize
from dist_train.data.placement import OnDevice
from dist_train.data.plan import MicroBatch, Plan, StepWork
from dist_train.objective.modules import Modules
from dist_train.objective.objective import Objective, SingleProcess, StepSums, step_sums
from dist_train.objective.precision import Precision
from dist_train.optim.optim import build_optimizer
from dist_train.reduction.reduce import ReportingObjective
from dist_train.step.step import Stepper
from dist_train.task.batch import move_batch
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised
from dist_train.training.digests import StepDigests

CUDA = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


@pytest.fixture(autouse=True, scope="module")
def fused_sgd_has_a_form() -> Iterator[None]:
    """torch has none for tensors without memory."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        with contextlib.suppress(RuntimeError):  # a later torch has
            library.impl("_fused_sgd_", lambda *args, **kwargs: None, "Meta")
        yield


class Waits(TorchDispatchMode):
    """Lists what makes the host wait for the device, with its line: reads of values, and copies to or from pageable memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.kernels += 1
        devices = [torch.device(kwargs["device"]).type] if kwargs.get("device") is not None else []
        devices += [arg.device.type for arg in args if isinstance(arg, Tensor)]
        crosses = name in ("_to_copy", "copy_") and len({*devices}) > 1
        if name in READS or (crosses and not (kwargs.get("non_blocking") or True in args[2:3])):
            lines = [
                f
                for f in traceback.extract_stack()
                if "test_fake" not in f.filename and "_python_dispatch" not in f.filename
            ]
            self.found[f"{name} @ {lines[-1].filename}:{lines[-1].lineno}"] += 1
        return func(*args, **kwargs)


class WithoutDDP:
    """The objective as DDP calls it, without DDP."""

    def __init__(self, objective: Objective):
        self.objective = ReportingObjective(objective, 8)

    def warm_up(self, batch: Any, rewind: Callable[[], object]) -> None:
        pass

    def forward_backward(self, batch: Any, micro: MicroBatch, *, scale: float) -> None:
        self.objective(batch, scale, micro.zero_weight).backward()

    def finish(self) -> StepSums:
        return step_sums(self.objective.report.grad.clone())


class Unopened:
    """A file of digests to which nothing is written."""

    def write(self, steps: Any, *, sync: bool = False) -> None:
        raise AssertionError("written in a step")

    def close(self) -> None:
        pass


def work(step: int, batch: Any, parts: int) -> StepWork:
    """A step of so many micro-batches of 16."""
    rows = np.arange(32)

    def micro_batches() -> Iterator[MicroBatch]:
        for k in range(parts):
            yield MicroBatch(0, step, rows, 16 * k, 16, k == parts - 1, batch)

    return StepWork(step, 0, 16 * parts, micro_batches())


def waits(
    monkeypatch: pytest.MonkeyPatch,
    loss: Any,
    target: Any,
    form: Any,
    precision: str,
    digested: bool = False,
    **options: Any,
) -> Waits:
    """A step after a first one; `digested`, as `debug.digest` has it."""
    monkeypatch.setattr(
        "dist_train.step.step.seed_forward", lambda *args, **options: None
    )  # there is no generator without a driver
    leaves: list[nn.Parameter] = []

    def backward(
        self: Tensor, gradient: Any = None
    ) -> None:  # autograd's threads need a device: gradients come ready-made
        for leaf in leaves:
            leaf.grad = torch.empty_like(leaf)

    monkeypatch.setattr(Tensor, "backward", backward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with CUDA:
            net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
            batch = (torch.randn(16, 3, 8, 8), target())
        net.on_host = torch.ones(3)  # a plain attribute, which no .to() takes along
        task = Supervised(Loss(loss).to(CUDA))
        task.loss._checked = True  # the check of the first batch reads, by intention
        monkeypatch.setattr(
            torch.cuda, "is_available", lambda: True
        )  # else autocast and the scaler switch themselves off
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
        scaler = torch.amp.GradScaler("cuda") if precision == "fp16" else None
        modules = Modules(net, task=task)
        optimizer = build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, modules, CUDA)
        assert optimizer.param_groups[0]["fused"]
        objective = Objective(modules, task, Precision(precision, "cuda"), scaler)
        objective.terms = getattr(loss, "terms", objective.terms)  # which a forward before the first step shows
        reducer = form(objective)
        leaves += [*(reducer.objective if form is WithoutDDP else net).parameters()]
        plan, config = Plan(0, 32, 32), TrainerConfig(**options)
        digests = StepDigests(modules, (), lambda names: Unopened()) if digested else None
        new_reducer = (lambda: reducer) if digests is None else digests.watched(lambda: reducer, objective)
        step = Stepper(objective, optimizer, new_reducer, plan, lambda micro, work: micro.batch, config)

        def steps(number: int, parts: int) -> None:
            step(work(number, batch, parts), want_norm=True)
            if digests is not None:
                digests.take(number + 1)

        steps(0, 1)
        with Waits() as seen:
            steps(1, 2)
    return seen


def several(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Two losses by name."""
    return {"entropy": nn.functional.cross_entropy(outputs, targets, reduction="none"), "size": outputs.square().sum(1)}


several.terms = ["entropy", "size"]
LOSSES: dict[str, tuple[Any, Callable[[], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.zeros(16, dtype=torch.int64)),
    "class weights": (nn.CrossEntropyLoss(weight=torch.ones(10)), lambda: torch.zeros(16, dtype=torch.int64)),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), lambda: torch.zeros(16, dtype=torch.int64)),
    "elements": (nn.MSELoss(), lambda: torch.zeros(16, 10)),
    "several": (several, lambda: torch.zeros(16, dtype=torch.int64)),
    "own mean": (lambda o, t: nn.functional.cross_entropy(o, t), lambda: torch.zeros(16, dtype=torch.int64)),
}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("form", [SingleProcess, WithoutDDP])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_lists_no_wait(monkeypatch: pytest.MonkeyPatch, name: str, form: Any, precision: str) -> None:
    options = {"clip_grad_norm": 1.0, "clip_grad_value": 0.5, "on_nonfinite": "skip"} if name == "elements" else {}
    seen = waits(monkeypatch, *LOSSES[name], form, precision, **options)
    assert seen.kernels > 50
    assert not seen.found


@pytest.mark.parametrize("form", [SingleProcess, WithoutDDP])
@pytest.mark.parametrize("name", ["elements", "several"])
def test_digests_of_a_step_list_no_wait(monkeypatch: pytest.MonkeyPatch, name: str, form: Any) -> None:
    with monkeypatch.context() as patch:
        plain = waits(patch, *LOSSES[name], form, "bf16")
    seen = waits(monkeypatch, *LOSSES[name], form, "bf16", digested=True)
    assert seen.kernels > plain.kernels + 20, "no digests were computed"
    assert not seen.found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_way_of_a_batch_from_device_memory_to_the_model_lists_no_wait(
    monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format
) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # fake tensors have none
    moving = [
        RandomShift(4),
        RandomCrop(36, padding=4),
        RandomHorizontalFlip(),
        RandomVerticalFlip(),
        RandomResizedCrop(32),
    ]
    steps = [*moving, RandomErasing(0.5), Cutout(8), OneOf([Mixup(10), CutMix(10)])]
    augmentation = Augmentation(steps, Normalize([0.1, 0.2, 0.3], [0.5, 0.5, 0.5]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with CUDA:
            rows = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64)
        dataset = OnDevice(range(64), rows)

        def batch(indices: Any) -> Any:
            read = move_batch(dataset.read_batch(indices), CUDA, memory_format)
            return augmentation(read, seed=0, epoch=0, indices=indices)

        batch(np.arange(9))
        with Waits() as seen:
            images, targets = batch(np.arange(20, 29))
    assert not seen.found
    assert seen.kernels > 20
    assert (images.device, images.dtype, images.shape, targets.shape) == (CUDA, torch.float32, (8, 3, 32, 32), (8, 10))
    assert images.is_contiguous(memory_format=memory_format)


def test_a_wait_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from pageable memory is; a read of a value ends such a step by itself."""

    def copies(outputs: Tensor, targets: Tensor) -> Any:
        return (outputs - targets).pow(2).sum(), torch.zeros(()).to(outputs.device)

    def reads(outputs: Tensor, targets: Tensor) -> Any:
        return (outputs - targets).pow(2).sum(), float(targets.sum())

    with monkeypatch.context() as patch:
        found = waits(patch, copies, LOSSES["elements"][1], WithoutDDP, "bf16").found
    assert [line.partition(" ")[0] for line in found] == ["_to_copy"]
    with pytest.raises(DataDependentOutputException):
        waits(monkeypatch, reads, LOSSES["elements"][1], SingleProcess, "bf16")
