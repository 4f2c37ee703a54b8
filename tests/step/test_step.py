"""The optimizer step: inf and nan, clipping, EMA, precision, groups and schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.config.schema import TrainerConfig
from dist_train.data.plan import MicroBatch, Plan, StepWork
from dist_train.objective.modules import Modules
from dist_train.objective.objective import Objective, SingleProcess
from dist_train.objective.precision import Precision, resolve_precision
from dist_train.optim.ema import EMA
from dist_train.optim.optim import build_optimizer
from dist_train.optim.schedule import Schedule, Span
from dist_train.schedules import WarmupCosine
from dist_train.step.finite import FiniteGuard, NonFiniteError
from dist_train.step.step import Stepper
from dist_train.task.losses import Loss
from dist_train.task.task import Supervised

CPU = torch.device("cpu")
PLAN = Plan(0, 8, 8, shuffle=False)
INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))


def work(step: int, inputs: Tensor = INPUTS, parts: int = 1) -> StepWork:
    """One optimizer step over `inputs`, in equal micro-batches."""
    size = len(inputs) // parts

    def micro_batches() -> Iterator[MicroBatch]:
        for k in range(parts):
            part = slice(k * size, (k + 1) * size)
            yield MicroBatch(0, step, np.arange(8)[part], k * size, size, k == parts - 1, (inputs[part], TARGETS[part]))

    return StepWork(step, 0, len(inputs), micro_batches())


def stepper(
    net: nn.Module, optimizer: torch.optim.Optimizer, precision: str = "fp32", loss: Any = None,
    scaler: torch.amp.GradScaler | None = None, **options: Any,
) -> Stepper:  # fmt: skip
    """A stepper on one process."""
    kind = Precision(precision, "cpu")
    objective = Objective(Modules(net), Supervised(Loss(loss or nn.MSELoss())), kind, scaler or kind.scaler())
    reducer, config = SingleProcess(objective), TrainerConfig(**options)
    return Stepper(objective, optimizer, lambda: reducer, PLAN, lambda micro, work: micro.batch, config)


def net() -> nn.Linear:
    """The same small layer each time."""
    torch.manual_seed(0)
    return nn.Linear(3, 1)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_is_the_step_of_a_plain_loop(parts: int) -> None:
    ours, plain = net(), net()
    step = stepper(ours, torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for k in range(3):
        step(work(k, parts=parts), want_norm=True)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(plain(INPUTS), TARGETS)
        loss.backward()
        norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in plain.parameters()))
        optimizer.step()
        torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(step.grad_norm, norm, rtol=1e-5, atol=1e-7)
    total, weight = step.totals[0].tolist()
    assert weight == 24
    assert total / weight > 0


def test_gradients_are_clipped_by_norm_and_by_value() -> None:
    for options, limit in (({"clip_grad_norm": 0.01}, 0.01), ({"clip_grad_value": 0.001}, 0.001)):
        layer = net()
        before = layer.weight.detach().clone()
        stepper(layer, torch.optim.SGD(layer.parameters(), lr=1.0), **options)(work(0), want_norm=False)
        moved = before - layer.weight.detach()
        assert 0 < float(moved.norm() if "clip_grad_norm" in options else moved.abs().max()) <= limit * 1.001


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inf_and_nan_end_the_run_before_the_update_and_are_named(bad: float) -> None:
    layer = net()
    step = stepper(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    step(work(0), want_norm=False)
    before = layer.weight.detach().clone()
    inputs = INPUTS.clone()
    inputs[5, 0] = bad
    with pytest.raises(NonFiniteError, match=r"step 2: .*first affected parameter: weight.*samples of the step: 0, 1"):
        step(work(1, inputs), want_norm=False)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("weight", [math.inf, torch.tensor(math.inf)])
def test_a_weight_that_is_inf_ends_the_run_though_loss_and_gradients_are_finite(weight: Any) -> None:
    layer = net()
    before = layer.weight.detach().clone()

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
        return (outputs - targets).square().sum(), weight

    with pytest.raises(NonFiniteError):
        stepper(layer, torch.optim.SGD(layer.parameters(), lr=0.1), loss=loss)(work(0), want_norm=False)
    assert torch.equal(layer.weight, before)


def test_a_bad_step_can_be_skipped_and_is_counted() -> None:
    layer, other = net(), net()
    step = stepper(layer, torch.optim.SGD(layer.parameters(), lr=0.1), on_nonfinite="skip")
    reference = stepper(other, torch.optim.SGD(other.parameters(), lr=0.1))
    bad = INPUTS.clone()
    bad[0] = math.nan
    for k, inputs in enumerate((INPUTS, bad, INPUTS)):
        step(work(k, inputs), want_norm=False)
    reference(work(0), want_norm=False)
    reference(work(2), want_norm=False)
    assert torch.equal(layer.weight, other.weight)
    assert step.guard.skipped == 1
    assert torch.equal(step.totals, reference.totals), "a skipped step isn't in the mean"


def test_a_step_skipped_for_its_weight_is_not_in_the_mean_where_the_host_does_not_wait() -> None:
    weights = iter([8.0, math.inf, 8.0])
    layer = net()

    def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        return (outputs - targets).square().sum(), next(weights)

    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
    step = stepper(layer, optimizer, loss=loss, on_nonfinite="skip")
    step.guard = FiniteGuard(step.modules, optimizer, PLAN, "skip", on_host=False)
    for k in range(3):
        step(work(k), want_norm=False)
    step.read()
    assert step.guard.skipped == 1
    assert step.totals[0, 1] == 16.0
    assert math.isfinite(step.totals[0, 0])


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_flags_that_are_read_later_skip_the_update_and_name_the_step(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where nobody waits for the device; fused kernels on the CPU take the flag too."""
    monkeypatch.setattr("dist_train.step.finite.MAX_UNREAD", 4)
    layer, other = net(), net()
    steppers = []
    for module in (layer, other):
        made = getattr(torch.optim, optimizer)(module.parameters(), lr=0.1, fused=True)
        steppers.append(stepper(module, made))
        steppers[-1].guard = FiniteGuard(module, made, PLAN, "stop", on_host=False)
    bad = INPUTS.clone()
    bad[3, 1] = math.inf
    for k in range(8):  # more than fit between two readings
        steppers[0](work(k, bad if k == 6 else INPUTS), want_norm=False)
        if k != 6:
            steppers[1](work(k), want_norm=False)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(steppers[0].totals, steppers[1].totals)
    with pytest.raises(NonFiniteError, match=r"step 7: .*the update was skipped"):
        steppers[0].guard.read()
    assert not steppers[1].guard.read()
    assert (steppers[0].guard.skipped, steppers[1].guard.skipped) == (1, 0)


def overflows_in_the_division(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Its sum and the gradient of that are finite, and no longer over this weight."""
    return (outputs - targets).pow(2).sum() * 1e9, 1e-35


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (overflows_in_the_division, {}, "weight"),
        (lambda o, t: (o.sum() * 1e25, 1.0), {"clip_grad_norm": 1.0}, "norm of the gra"),
    ],
)
def test_what_becomes_inf_only_after_the_backward_is_found_before_the_update(
    on_host: bool, loss: Any, options: Any, message: str
) -> None:
    layer = net()
    made = build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, layer, CPU)
    step = stepper(layer, made, loss=loss, **options)
    step.guard = FiniteGuard(layer, made, PLAN, "stop", on_host=on_host)
    before = layer.weight.detach().clone()

    def run() -> None:
        step(work(0), want_norm=False)
        step.guard.read()

    with pytest.raises(NonFiniteError, match=message if on_host else "the update was skipped"):
        run()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("precision", "on_host"), [("fp32", True), ("fp32", False), ("fp16", True), ("fp16", False)])
def test_a_skipped_first_step_leaves_buffers_and_momentum_unchanged(precision: str, on_host: bool) -> None:
    """Also where the flag isn't read, as on CUDA: torch's fused SGD has only uninitialized momentum then."""
    bad = INPUTS.clone()
    bad[0] = math.inf
    found = []
    for inputs in ((bad, INPUTS, INPUTS), (INPUTS, INPUTS)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        made = build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}, model, CPU)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0) if precision == "fp16" else None
        step = stepper(model, made, precision, scaler=scaler, on_nonfinite="skip")
        policy = "rescale" if precision == "fp16" else "skip"
        step.guard = FiniteGuard(model, made, PLAN, policy, on_host=on_host)
        junk = [torch.full((n,), 1e3) for n in (1, 3) for _ in range(99)]  # what unwritten memory would hold
        del junk
        for k, part in enumerate(inputs):
            step(work(3 - len(inputs) + k, part), want_norm=False)
        step.guard.read()
        found.append((step, made, model.state_dict()))
    (step, made, state), (_, other, expected) = found
    assert step.guard.skipped == 1
    assert {name: value.tolist() for name, value in state.items()} == {name: v.tolist() for name, v in expected.items()}
    momenta = [[s["momentum_buffer"].tolist() for s in optimizer.state.values()] for optimizer in (made, other)]
    assert momenta[0] == momenta[1]


def test_filled_in_momentum_has_the_bits_of_torchs_first_step() -> None:
    ours, plain = net(), net()
    made = build_optimizer({"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True}, ours, CPU)
    assert made.param_groups[0]["fused"]
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    for _ in range(2):
        for layer, optimizer in ((ours, made), (plain, reference)):
            layer.weight.grad, layer.bias.grad = torch.tensor([[-0.0, 0.0, 1e-3]]), torch.ones(1)
            optimizer.step()
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            bits = [
                optimizer.state[p]["momentum_buffer"].view(torch.int32) for optimizer, p in ((made, a), (reference, b))
            ]
            assert torch.equal(*bits)
            assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train_on_the_cpu_too(precision: str) -> None:
    layer, plain = net(), net()
    half = stepper(layer, torch.optim.SGD(layer.parameters(), lr=0.1), precision)
    for k in range(4):
        half(work(k), want_norm=False)
    full = stepper(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    for k in range(4 - half.guard.skipped):  # fp16 finds its scale by overflowing first
        full(work(k), want_norm=False)
    assert half.guard.skipped < 4
    torch.testing.assert_close(layer.weight, plain.weight, rtol=0.05, atol=0.01)
    assert not torch.equal(layer.weight, plain.weight), f"{precision} did nothing"


def test_fp16_overflows_are_skipped_and_twenty_in_a_row_end_the_run() -> None:
    layer = net()
    step = stepper(layer, torch.optim.SGD(layer.parameters(), lr=0.1), "fp16")
    before = layer.weight.detach().clone()
    scale = step.scaler.get_scale()
    for k in range(19):
        step(work(k, INPUTS * 1e30), want_norm=False)
    assert torch.equal(layer.weight, before)
    assert step.guard.skipped == 19
    assert step.scaler.get_scale() < scale
    with pytest.raises(NonFiniteError, match="fp16 overflowed 20 times in a row"):
        step(work(19, INPUTS * 1e30), want_norm=False)


def test_ema_is_the_recursion_and_gives_the_weights_back() -> None:
    layer = net()
    ema = EMA(layer, 0.9)
    expected = layer.weight.detach().clone()
    step = stepper(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for k in range(4):
        step(work(k), want_norm=False)
        ema.update()
        expected = 0.9 * expected + 0.1 * layer.weight.detach()
    raw = layer.weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(layer.weight, raw)
    other = EMA(layer, 0.9)
    other.load_state_dict(ema.state_dict())
    with other.applied():
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-7)


def test_groups_take_parameters_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    spec = {
        "_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.5,
        "groups": [{"match": "2.*", "lr": 0.01}, {"match": ["*.bias", "1.*"], "weight_decay": 0.0}],
    }  # fmt: skip
    optimizer = build_optimizer(spec, model, CPU)
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    assert sizes == [12, 10, 12]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.1, 0.5),
        (0.01, 0.5),
        (0.1, 0.0),
    ]
    with pytest.raises(ConfigError, match=r"optimizer\.groups\.0\.match: 3\.\* matches no parameter"):
        build_optimizer({**spec, "groups": [{"match": "3.*"}]}, model, CPU)
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(ConfigError, match="nothing to train"):
        build_optimizer(spec, model, CPU)


def schedule(spec: dict[str, Any]) -> tuple[torch.optim.Optimizer, Schedule]:
    """A schedule over 100 steps of 10 an epoch."""
    optimizer = torch.optim.SGD(net().parameters(), lr=1.0)
    return optimizer, Schedule(spec, optimizer, Span(100, 10, 100), ("val/loss", "min"))


def test_schedules_know_when_they_step_and_how_long_the_run_is() -> None:
    _, step_lr = schedule({"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 5})
    assert str(step_lr.every) == "1ep"
    _, cycle = schedule(
        {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1, "total_steps": "total_steps"}
    )
    assert str(cycle.every) == "1step"
    assert cycle.scheduler.total_steps == 100
    optimizer, cosine = schedule(
        {"_target_": "dist_train.schedules.WarmupCosine", "total_steps": "total_steps", "warmup_steps": 4}
    )
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates == sorted(rates[:5]) + sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.001
    with pytest.raises(ValueError, match="warmup_steps"):
        WarmupCosine(optimizer, total_steps=10, warmup_steps=-1)


def test_precision_is_accelerates_where_the_config_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("auto", CPU).name == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert resolve_precision("auto", CPU).name == "bf16"
    contradiction = resolve_precision("fp32", CPU)
    assert contradiction.name == "fp32"
    assert "bf16" in str(contradiction.note)
