"""`of` and `name` of a metric: what it is computed of, and what it is recorded as."""

from __future__ import annotations

from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from built import entries, values
from torch import Tensor, nn

from dist_train.config.errors import ConfigError
from dist_train.metrics import Metric
from dist_train.task.entries import is_lower_better
from dist_train.task.selection import Selection

GENERATOR = torch.Generator().manual_seed(1)
LOGITS, AUX = torch.randn(60, 3, generator=GENERATOR), torch.randn(60, 3, generator=GENERATOR)
LABELS = torch.randint(0, 3, (60,), generator=GENERATOR)
MASKS = {"masks": LABELS, "boxes": [LABELS]}
Pair = namedtuple("Pair", "logits aux")


@pytest.mark.parametrize(
    ("of", "outputs", "targets", "expected"),
    [
        ("argmax", LOGITS, LABELS, (LOGITS.argmax(1), LABELS)),
        ("softmax", LOGITS, LABELS, (LOGITS.softmax(1), LABELS)),
        ("softmax.1", LOGITS, LABELS, (LOGITS.softmax(1)[:, 1], LABELS)),
        ("sigmoid", LOGITS, LABELS, (LOGITS.sigmoid(), LABELS)),
        ("2", LOGITS, LABELS, (LOGITS[:, 2], LABELS)),
        ("out", {"out": LOGITS, "aux": AUX}, LABELS, (LOGITS, LABELS)),
        ("out.argmax", {"out": LOGITS, "aux": AUX}, LABELS, (LOGITS.argmax(1), LABELS)),
        ("head.out.sigmoid", {"head": UserDict(out=LOGITS)}, LABELS, (LOGITS.sigmoid(), LABELS)),
        (0, (LOGITS, AUX), LABELS, (LOGITS, LABELS)),
        ("1.argmax", [LOGITS, AUX], LABELS, (AUX.argmax(1), LABELS)),
        ("logits", Pair(LOGITS, AUX), LABELS, (LOGITS, LABELS)),
        ("logits.softmax", SimpleNamespace(logits=LOGITS), LABELS, (LOGITS.softmax(1), LABELS)),
        ("0", {0: LOGITS}, LABELS, (LOGITS, LABELS)),
        ("age", {"age": LOGITS, "sex": AUX}, {"age": LABELS, "sex": AUX}, (LOGITS, LABELS)),
        ("age.argmax", {"age": LOGITS}, {"age": LABELS}, (LOGITS.argmax(1), LABELS)),
        ({"outputs": "out", "targets": "masks"}, {"out": LOGITS}, MASKS, (LOGITS, LABELS)),
        ({"targets": "boxes.0"}, LOGITS, MASKS, (LOGITS, LABELS)),
        ({"outputs": "out.argmax"}, {"out": LOGITS}, LABELS, (LOGITS.argmax(1), LABELS)),
        (lambda outputs, targets: (outputs["out"], targets + 1), {"out": LOGITS}, LABELS, (LOGITS, LABELS + 1)),
        ({"_target_": "torch.maximum"}, LOGITS, AUX, None),
    ],
)
def test_the_arguments_are_what_it_says(
    of: Any, outputs: Any, targets: Any, expected: tuple[Tensor, Tensor] | None
) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"must return \(outputs, targets\), but gave float32 \(60, 3\)"):
            Selection(of)(outputs, targets)
        return
    found = Selection(of)(outputs, targets)
    assert [type(part) for part in found] == [Tensor, Tensor]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("of", "outputs", "message"),
    [
        ("logits", {"out": LOGITS}, r"the outputs have no logits: they are {out: float32 \(60, 3\)}"),
        (
            "argmax",
            {"out": LOGITS},
            r"the outputs have no argmax: .*is taken of a tensor, so name that first: KEY.argmax",
        ),
        (
            "logits",
            LOGITS,
            r"the outputs are a tensor, float32 \(60, 3\), which has no logits: .*argmax, softmax, sigmoid",
        ),
        ("3", LOGITS, r"3 is taken over dim 1, of at least 4 columns, but the outputs are float32 \(60, 3\)"),
        ("argmax", LOGITS[:, :1], r"argmax is taken over dim 1, of at least 2 columns, .*\(60, 1\)"),
        ("out.softmx", {"out": LOGITS}, r"out of the outputs are a tensor, .*which has no softmx"),
        ("5", (LOGITS, AUX), r"the outputs have no 5: they are tuple\[float32 \(60, 3\), float32 \(60, 3\)\]"),
        ("keys", UserDict(a=LOGITS), "the outputs have no keys: they are UserDict{a"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(of: str, outputs: Any, message: str) -> None:
    (metric,) = entries({"metric": "mae", "of": of})
    with pytest.raises(RuntimeError, match=f"metric mae: ValueError: {message}.*; it got outputs .* and targets int64"):
        metric.sums(outputs, LABELS)


def test_a_metric_of_dicts_is_told_of_the_key() -> None:
    with pytest.raises(
        RuntimeError, match=r"metric accuracy: .*it got outputs {out: float32 \(60, 3\)}.*as in of: logits"
    ):
        entries("accuracy")[0].sums({"out": LOGITS}, LABELS)


def test_ready_metrics_take_the_logits_of_a_mapping_as_torchs_losses_do_and_ones_own_take_all() -> None:
    outputs = UserDict(loss=torch.tensor(1.0), logits=LOGITS)
    (right,) = values(entries("accuracy")[0], LOGITS, LABELS).values()
    torchmetrics = {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 3, "average": "micro"}
    accuracy, whole, own = entries("accuracy", torchmetrics, {"_target_": f"{__name__}.Takes", "size": 1})
    assert accuracy.results(accuracy.sums(outputs, LABELS)) == {"accuracy": right}
    whole.update(outputs, LABELS)
    assert [*whole.results(torch.zeros(0)).values()] == [pytest.approx(right)]
    assert own.sums(outputs, LABELS).tolist() == [2.0], "the mapping itself, of two entries"


class Takes(Metric):
    name = "takes"

    def __init__(self, size: int):
        self.size = size

    def sums(self, outputs: Any, targets: Tensor) -> Tensor:
        return torch.tensor([len(outputs)])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"metric": "acuracy"}, "there is no metric acuracy; did you mean accuracy?"),
        ({"metric": "accuracy", "_target_": "x.Y"}, "metric and _target_ are both given"),
        ({"metric": "accuracy", "tap": 3}, "Accuracy has no argument tap; did you mean top?"),
        ({"metric": {"_target_": "dist_train.metrics.R2"}, "top": 3}, "top is no key here"),
        ({"metric": "accuracy", "name": "a b"}, "name: expected a name of letters, digits, _, - and dots, found"),
        ({"metric": "accuracy", "of": ""}, "of: expected argmax, softmax"),
        ({"metric": "accuracy", "of": "a..b"}, "of: expected argmax, softmax"),
        ({"metric": "accuracy", "of": {"outputs": "a", "target": "b"}}, "found the keys outputs, target"),
        ({"metric": "accuracy", "of": {"outputs": ["a"]}}, "of.outputs: expected a dotted path like logits"),
        ({"metric": "accuracy", "of": {"_target_": "torch.nosuch"}}, "module torch has no nosuch"),
        ({"_target_": "dist_train.metrics.R2", "of": {"_target_": "torch.nosuch"}}, "module torch has no nosuch"),
        ({"_target_": "dist_train.metrics.R2", "name": "val/x"}, "expected a name of letters"),
    ],
)
def test_wrong_entries_are_refused_by_key(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        entries(entry)
    (problem,) = raised.value.problems
    assert message in problem.message
    assert problem.key.startswith("metrics.0")


class Errors(Metric):
    """Three numbers, without a name of its own."""

    def __init__(self, of: int = 0):
        self.of = of

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.stack([(outputs - targets).abs().double().sum(), torch.tensor(float(targets.numel())).double()])

    def result(self, sums: Tensor) -> Any:
        return {"errors": sums[0] / sums[1], "parts": [1.0, 2.0]}


def test_a_name_takes_the_place_of_the_metrics_own_and_goes_before_what_else_it_gives() -> None:
    collection = {
        "_target_": "torchmetrics.MetricCollection",
        "metrics": {"l1": {"_target_": "torchmetrics.MeanAbsoluteError"}},
        "name": "both",
    }
    r2 = {"_target_": "torchmetrics.R2Score", "name": "fit"}
    own = {"_target_": f"{__name__}.Errors", "name": "own"}
    named = entries(
        {"metric": "mae", "name": "years"}, collection, r2, own, {"metric": "miou", "name": "area", "per_class": True}
    )
    years, both, fit, errors, area = named
    real, guess = LOGITS[:, 0], AUX[:, 0]
    mae = (real - guess).abs().mean().item()
    assert values(years, guess, real) == {"years": pytest.approx(mae)}
    assert values(both, guess, real) == {"both_l1": pytest.approx(mae, rel=1e-5)}
    assert [*values(fit, guess, real)] == ["fit"]
    assert values(errors, guess, real) == {"own_errors": pytest.approx(mae), "own_parts_0": 1.0, "own_parts_1": 2.0}
    assert [*values(area, LOGITS, LABELS, "abc")] == ["area", "area_iou_a", "area_iou_b", "area_iou_c"]
    assert [entry.primary for entry in named] == ["years", "both_l1", "fit", "own", "area"]
    lower = {name: is_lower_better(f"val/{name}", named) for name in ("years", "both_l1", "fit", "area_iou_a", "loss")}
    assert lower == {"years": True, "both_l1": True, "fit": False, "area_iou_a": False, "loss": True}


def test_two_entries_of_one_class_have_names_of_their_own() -> None:
    top = {"metric": "accuracy", "of": "out"}
    with pytest.raises(ValueError, match=r"2 metrics are called accuracy.*another `name`"):
        entries(top, {**top, "of": "aux"})
    out, aux = entries(top, {**top, "of": "aux", "name": "aux_accuracy"})
    outputs = {"out": LOGITS, "aux": AUX}
    for entry, logits in ((out, LOGITS), (aux, AUX)):
        (right,) = entry.results(entry.sums(outputs, LABELS)).values()
        assert right == (logits.argmax(1) == LABELS).double().mean()
    with pytest.raises(ValueError, match="can't be called step"):
        entries({"metric": "mae", "name": "step"})


def test_a_class_that_takes_name_or_of_itself_gets_them_and_metric_has_both() -> None:
    spec = {"_target_": f"{__name__}.Errors", "of": 1, "name": "a"}
    (own,) = entries(spec)
    assert own.of is None
    assert own.metric.of == 1  # type: ignore[attr-defined]
    (both,) = entries({"metric": {"_target_": spec["_target_"], "of": 2}, "of": "out", "name": "a"})
    assert both.metric.of == 2  # type: ignore[attr-defined]
    assert str(both.of) == "out"


def test_the_threshold_of_a_loss_on_logits_is_not_that_of_probabilities() -> None:
    loss = nn.BCEWithLogitsLoss()
    thresholds = {
        str(of): entries({"metric": "binary_accuracy", **({"of": of} if of else {})}, loss=loss)[0].metric.threshold  # type: ignore[attr-defined]
        for of in (None, "sigmoid", "0", "out.sigmoid")
    }
    assert thresholds == {"None": 0.0, "sigmoid": 0.5, "0": 0.0, "out.sigmoid": 0.5}
    with pytest.raises(ValueError, match="what `of` gives isn't known: give threshold"):
        entries({"metric": "binary_accuracy", "of": lambda o, t: (o, t)}, loss=loss)
