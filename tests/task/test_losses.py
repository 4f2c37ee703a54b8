"""A loss as (sum, weight): the quotient is torch's own mean, and shapes that do not fit are errors."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from dist_train.config.errors import ConfigError
from dist_train.objective.objective import trainable
from dist_train.task.losses import Loss
from dist_train.task.terms import computed, mean_of

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(12, 5, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 4, -100, 1, 2, -100, 4, 0, 3])
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
REAL = torch.randn(12, 5, generator=GENERATOR, dtype=torch.float64)
SHARES = torch.softmax(REAL, 1)

CASES = {
    "cross-entropy": (nn.CrossEntropyLoss(), LOGITS, LABELS),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LOGITS, LABELS),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=2), LOGITS, LABELS.clamp(min=0)),
    "weights and ignored class": (nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=2), LOGITS, LABELS.clamp(min=0)),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, LABELS),
    "label smoothing and weights": (
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
        LOGITS,
        LABELS.clamp(min=0),
    ),
    "class probabilities": (nn.CrossEntropyLoss(), LOGITS, SHARES),
    "class probabilities and weights": (nn.CrossEntropyLoss(weight=WEIGHTS), LOGITS, SHARES),
    "pixels": (nn.CrossEntropyLoss(weight=WEIGHTS), LOGITS.reshape(3, 5, 4), LABELS.reshape(3, 4)),
    "nll": (nn.NLLLoss(weight=WEIGHTS), torch.log_softmax(LOGITS, 1), LABELS),
    "mse": (nn.MSELoss(), LOGITS, REAL),
    "l1": (nn.L1Loss(), LOGITS, REAL),
    "huber": (nn.HuberLoss(delta=0.7), LOGITS, REAL),
    "smooth l1": (nn.SmoothL1Loss(), LOGITS, REAL),
    "bce": (nn.BCELoss(), torch.sigmoid(LOGITS), SHARES),
    "bce with weights": (nn.BCELoss(weight=WEIGHTS), torch.sigmoid(LOGITS), SHARES),
    "bce with logits": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), LOGITS, SHARES),
    "kl batchmean": (nn.KLDivLoss(reduction="batchmean"), torch.log_softmax(LOGITS, 1), SHARES),
    "kl mean": (nn.KLDivLoss(), torch.log_softmax(LOGITS, 1), SHARES),
    "poisson": (nn.PoissonNLLLoss(), LOGITS, SHARES),
    "hinge embedding": (nn.HingeEmbeddingLoss(), LOGITS, REAL.sign()),
    "multi margin": (nn.MultiMarginLoss(), LOGITS, LABELS.clamp(min=0)),
    "soft margin": (nn.SoftMarginLoss(), LOGITS, REAL.sign()),
    "function": (functools.partial(nn.functional.cross_entropy, label_smoothing=0.2), LOGITS, LABELS),
}


@pytest.mark.parametrize("name", CASES)
def test_sum_over_weight_is_torchs_own_mean(name: str) -> None:
    function, outputs, targets = CASES[name]
    total, weight = Loss(function)(outputs, targets)
    torch.testing.assert_close(total / weight, function(outputs, targets), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CASES if name != "bce with weights"])  # its weight spans the batch
def test_parts_add_up_to_the_whole(name: str) -> None:
    function, outputs, targets = CASES[name]
    loss = Loss(function)
    parts = [loss(outputs[part], targets[part]) for part in (slice(0, 1), slice(1, 2), slice(2, None))]
    total, weight = sum(part[0] for part in parts), sum(part[1] for part in parts)
    torch.testing.assert_close(total / weight, function(outputs, targets), rtol=1e-12, atol=1e-14)
    assert loss.exact is True


def test_a_sum_is_a_sum_and_is_logged_as_a_mean_over_samples() -> None:
    loss = Loss(nn.CrossEntropyLoss(reduction="sum"))
    total, weight = loss(LOGITS, LABELS.clamp(min=0))
    assert loss.summed
    assert weight == 12
    torch.testing.assert_close(total, nn.functional.cross_entropy(LOGITS, LABELS.clamp(min=0), reduction="sum"))


def test_ones_own_function_may_say_sum_and_weight_or_one_value_per_sample_or_a_mean() -> None:
    pair = Loss(lambda outputs, targets: ((outputs - targets).abs().sum(), 7.0))
    each = Loss(lambda outputs, targets: (outputs - targets).abs().mean(1))
    mean = Loss(lambda outputs, targets: (outputs - targets).abs().mean())
    assert pair(LOGITS, REAL)[1] == 7.0
    assert each(LOGITS, REAL)[1] == 12
    assert mean(LOGITS, REAL)[1] == 12
    assert (pair.exact, each.exact, mean.exact) == (True, True, False)


def test_half_precision_outputs_reach_the_loss_as_float32() -> None:
    total, _ = Loss(nn.CrossEntropyLoss())(LOGITS.to(torch.bfloat16), LABELS)
    assert total.dtype == torch.float32


def test_the_mean_over_nothing_has_no_weight_and_other_nans_stay() -> None:
    mean = Loss(lambda outputs, targets: nn.functional.cross_entropy(outputs, targets))
    outputs = LOGITS.clone().requires_grad_()
    total, weight = mean(outputs, torch.full_like(LABELS, -100))
    total.backward()
    assert (float(total.detach()), float(weight)) == (0.0, 0.0)
    assert not outputs.grad.any()
    total, weight = mean(LOGITS * math.nan, LABELS)
    assert math.isnan(float(total))
    assert float(weight) == len(LABELS)


@pytest.mark.parametrize(
    "function",
    [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.BCELoss(),
        nn.BCEWithLogitsLoss(),
        nn.PoissonNLLLoss(),
        nn.KLDivLoss(reduction="batchmean"),
    ],
)
def test_a_trailing_one_is_no_broadcast(function: nn.Module) -> None:
    outputs = torch.rand(8, 1, dtype=torch.float64)
    targets = torch.rand(8, dtype=torch.float64)
    total, weight = Loss(function)(outputs, targets)
    assert weight == 8
    torch.testing.assert_close(total / weight, function(outputs[:, 0], targets))
    total, weight = Loss(function)(outputs[:, 0], targets[:, None])
    torch.testing.assert_close(total / weight, function(outputs[:, 0], targets))


BAD = {
    "another broadcast": (nn.MSELoss(), torch.zeros(8, 3), torch.zeros(8), "equal shapes"),
    "label too large": (nn.CrossEntropyLoss(), torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "labels must be 0 to 2"),
    "negative label": (nn.CrossEntropyLoss(), torch.zeros(2, 3), torch.tensor([0, -1]), "range from -1 to 0"),
    "float labels": (nn.CrossEntropyLoss(), torch.zeros(4, 3), torch.zeros(4), "class numbers"),
    "labels of another length": (
        nn.CrossEntropyLoss(),
        torch.zeros(4, 3),
        torch.zeros(5, dtype=torch.int64),
        "(N, classes, ...)",
    ),
    "logits to BCELoss": (nn.BCELoss(), torch.full((4,), 3.0), torch.ones(4), "BCEWithLogitsLoss"),
    "BCE targets above 1": (nn.BCEWithLogitsLoss(), torch.zeros(4), torch.full((4,), 2.0), "between 0 and 1"),
    "no tensor": (lambda outputs, targets: "much", torch.zeros(4), torch.zeros(4), "must return one tensor"),
    "several": (
        lambda o, t: {"box": o.sum(), "mask": "much"},
        torch.zeros(4),
        torch.zeros(4),
        "'s mask must return one tensor",
    ),
    "loss and logits": (
        lambda o, t: (o.sum(), o),
        torch.zeros(4),
        torch.zeros(4),
        "they are () and (4,); return only the loss",
    ),
    "a mean over nobody knows": (lambda o, t: torch.zeros(()), "?", object(), "return (sum, weight)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_an_error(name: str) -> None:
    function, outputs, targets, message = BAD[name]
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Loss(function)(outputs, targets)


@pytest.mark.parametrize(
    ("outputs", "targets", "samples"),
    [
        (REAL, object(), 12),
        (torch.zeros(2, 5), [{"boxes": torch.ones(3, 4)}, {"boxes": torch.ones(1, 4)}], 2),
        ({"loss": torch.zeros(())}, [{"boxes": torch.ones(3, 4)}, {"boxes": torch.ones(1, 4)}], 2),
        (REAL, [{"a": REAL}, {"b": REAL}], 12),
        (REAL, [LABELS, LABELS], 12),
    ],
)
def test_one_number_counts_for_the_samples_whatever_targets_look_like(
    outputs: object, targets: object, samples: int
) -> None:
    total, weight = Loss(lambda o, t: torch.tensor(2.0))(outputs, targets)
    assert (float(total), weight) == (2.0 * samples, samples)


def test_a_loss_that_can_not_be_trained_is_named() -> None:
    with pytest.raises(ConfigError, match=r"TripletMarginLoss takes .* missing a required argument: 'negative'"):
        Loss(nn.TripletMarginLoss())
    outputs = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="the second depends on the model too, so it is another loss"):
        Loss(lambda o, t: (o.sum(), o.mean()))(outputs, torch.zeros(2))
    with pytest.raises(ValueError, match="expected a real loss that depends on a trainable parameter"):
        trainable(computed((outputs.detach().sum(), 2)))
    with pytest.raises(ValueError, match=r"the weight of a loss .* must not depend on parameters"):
        trainable(computed((outputs.sum(), outputs.mean())))


def test_a_loss_without_weight_adds_nothing_to_several_with_weights_of_their_own() -> None:
    """In an interval or an evaluation none of whose samples has it; nan of a loss itself stays nan."""
    assert mean_of([1.0, 0.5], [(6.0, 4.0), (0.0, 0.0)]) == 1.5
    assert mean_of([1.0, 0.5], [(6.0, 4.0), (2.0, 8.0)]) == 1.625
    assert math.isnan(mean_of([1.0, 0.5], [(0.0, 0.0), (0.0, 0.0)]))
    assert math.isnan(mean_of([1.0, 0.5], [(6.0, 4.0), (math.nan, 8.0)]))
