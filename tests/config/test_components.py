from __future__ import annotations

import functools
import inspect
import sys
from pathlib import Path

import pytest
import torch

from dist_train.config.code import read_signature
from dist_train.config.components import (
    add_code_paths,
    build,
    build_callable,
    locate,
    reserved,
    type_names,
)
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.config.slots import check_components


def spec(target: object, **arguments: object) -> dict[str, object]:
    return {"_target_": target, **arguments}


def complaints(**live: object) -> list[str]:
    source = {
        "data": {"train": spec("dist_train.data.Digits")},
        "model": spec("dist_train.models.DigitsCNN"),
        "loss": spec("torch.nn.CrossEntropyLoss"),
        "optimizer": spec("torch.optim.SGD"),
    }
    if "train" in live:
        source["data"] = {"train": live.pop("train")}
    return [str(problem) for problem in check_components(load_config({**source, **live}))]


def test_locate_finds_classes_methods_and_reexports() -> None:
    assert locate("torch.nn.Linear") is torch.nn.Linear
    assert locate("torch.nn.functional.cross_entropy") is torch.nn.functional.cross_entropy
    assert locate("torch.Tensor.numpy") is torch.Tensor.numpy
    assert locate("torch.optim.sgd.SGD") is torch.optim.SGD  # a module that its package deletes from itself
    assert locate(torch.nn.Linear) is torch.nn.Linear


def test_a_function_named_as_its_module_is_found(folder: Path) -> None:
    (folder / "pack").mkdir()
    (folder / "pack" / "__init__.py").write_text("from .net import net\n")
    (folder / "pack" / "net.py").write_text("def net():\n    return 3\n")
    add_code_paths([str(folder)])
    assert build(spec("pack.net")) == 3


def test_code_paths_come_first_and_are_added_once(folder: Path) -> None:
    before = list(sys.path)
    add_code_paths(["a", "b"])
    assert sys.path == [str(folder / "a"), str(folder / "b"), *before]
    add_code_paths(["a", "b"])
    assert sys.path == [str(folder / "a"), str(folder / "b"), *before]


def test_nested_specs_and_lists_are_built_first() -> None:
    model = build(spec("torch.nn.Sequential", _args_=[spec("torch.nn.Linear", _args_=[2, 3]), spec("torch.nn.ReLU")]))
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU"]
    subset = build(spec("torch.utils.data.Subset", dataset=spec("dist_train.data.Digits"), indices=[5, 7]))
    assert len(subset) == 2


def test_arguments_of_the_engine_come_first_and_keywords_win() -> None:
    optimizer = build(spec("torch.optim.SGD", lr=0.5), [torch.zeros(1, requires_grad=True)], lr=0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_lists_become_tensors_where_the_signature_wants_one() -> None:
    loss = build(spec("torch.nn.CrossEntropyLoss", weight=[1.0, 2.0]))
    assert torch.equal(loss.weight, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    ("annotation", "wanted"),
    [
        (torch.Tensor, True),
        (torch.Tensor | None, True),
        ("Tensor | None", True),
        ("Optional[torch.Tensor]", True),
        ("float | Tensor", True),
        (list[torch.Tensor], False),
        ("list[Tensor]", False),
        ("Sequence[Tensor]", False),
        (float, False),
        (inspect.Parameter.empty, False),
    ],
)
def test_only_a_tensor_or_a_union_with_it_wants_one(annotation: object, wanted: bool) -> None:
    assert ("Tensor" in type_names(annotation)) is wanted


def test_live_objects_are_returned_as_they_are_and_live_factories_called() -> None:
    model = torch.nn.Linear(2, 2)
    assert build(model) is model
    weights = [torch.zeros(1, requires_grad=True)]
    assert isinstance(build(functools.partial(torch.optim.SGD, lr=0.1), weights), torch.optim.SGD)
    assert isinstance(build(lambda params: torch.optim.SGD(params), weights), torch.optim.SGD)
    optimizer = torch.optim.SGD(weights)
    assert build(optimizer, weights) is optimizer


def test_a_loss_may_be_a_class_a_factory_or_a_function(folder: Path) -> None:
    add_code_paths([str(folder)])
    assert isinstance(build_callable(spec("torch.nn.MSELoss")), torch.nn.MSELoss)
    weighted = build_callable(spec("mynet.make_loss", weight=[1.0, 3.0]))
    assert isinstance(weighted, torch.nn.CrossEntropyLoss)
    huber = build_callable(spec("mynet.huber", delta=2.0))
    assert isinstance(huber, functools.partial)
    assert huber(torch.tensor([5.0]), torch.tensor([0.0])) == 8.0
    assert build_callable(spec("torch.nn.functional.mse_loss")) is torch.nn.functional.mse_loss
    assert build_callable(torch.nn.functional.mse_loss) is torch.nn.functional.mse_loss


def test_reserved_keys_are_taken_out_of_a_copy() -> None:
    whole = spec("torch.optim.SGD", lr=0.1, groups=[1])
    assert reserved(whole, {"groups", "every"}) == (spec("torch.optim.SGD", lr=0.1), {"groups": [1]})
    assert "groups" in whole
    live = object()
    assert reserved(live, {"groups"}) == (live, {})


def test_building_raises_what_the_component_raises() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        build(spec("torch.optim.SGD", lr=-1.0), [torch.zeros(1, requires_grad=True)])
    with pytest.raises(ConfigError, match=r"did you mean torch\.nn\.Linear"):
        build(spec("torch.nn.Linea"))


def test_live_objects_are_checked_for_their_slot() -> None:
    model = torch.nn.Linear(2, 2)
    weights = [torch.zeros(1, requires_grad=True)]
    assert complaints(model=model, train=torch.utils.data.TensorDataset(torch.zeros(2, 2))) == []
    assert complaints(optimizer=functools.partial(torch.optim.SGD, lr=0.1), loss=torch.nn.functional.mse_loss) == []
    assert complaints(optimizer=torch.optim.SGD) == []
    assert complaints(model=torch.nn.ReLU) == [
        "dict: model: expected a torch.nn.Module, found the class ReLU itself: write ReLU(...)"
    ]
    assert complaints(optimizer=torch.optim.SGD(weights)) == [
        "dict: optimizer: expected a factory called with (params), such as functools.partial, found an object of class "
        "torch.optim.sgd.SGD"
    ]
    assert complaints(train=model) == [
        "dict: data.train: expected a dataset, with __getitem__ and __len__, found an object of class "
        "torch.nn.modules.linear.Linear"
    ]
    assert complaints(optimizer=torch.nn.Linear) == [
        "dict: optimizer: expected a torch.optim.Optimizer, found the class Linear"
    ]


def test_what_is_right_is_left_alone(folder: Path) -> None:
    (folder / "x.yaml").write_text(
        "extends: base.yaml\n"
        "model: {_target_: mynet.Net, width: 3, scale: 2}\n"
        "loss: {_target_: mynet.huber, delta: 2}\n"
        "optimizer: {_target_: mynet.any_optimizer, lr: 0.1, groups: [{match: '*', anything: 3}]}\n"
        "scheduler: {_target_: torch.optim.lr_scheduler.OneCycleLR, max_lr: 0.1, total_steps: total_steps}\n"
        "data: {collate: {_target_: torch.utils.data.default_collate}}\n"
        "callbacks: [{_target_: dist_train.callbacks.Callback}]\n"
        "metrics: [top5, {_target_: dist_train.metrics.Accuracy, top: 3}]\n"
    )
    assert [str(problem) for problem in check_components(load_config("x.yaml"))] == []
    for name in ("ReduceLROnPlateau", "SequentialLR", "CosineAnnealingLR"):
        arguments = {"SequentialLR": {"schedulers": [], "milestones": []}, "CosineAnnealingLR": {"T_max": 3}}.get(
            name, {}
        )
        assert (
            complaints(
                scheduler=spec(f"torch.optim.lr_scheduler.{name}", **arguments),
                data={"train": spec("dist_train.data.Digits"), "val": spec("dist_train.data.Digits", split="val")},
            )
            == []
        )


@pytest.mark.parametrize(
    "path",
    [
        "torch.optim.SGD",
        "torch.optim.AdamW",
        "torch.nn.CrossEntropyLoss",
        "torch.nn.Linear",
        "torch.optim.lr_scheduler.StepLR",
        "dist_train.models.MLP",
        "dist_train.data.Digits",
        "dist_train.schedules.WarmupCosine",
        "mynet.Net",
        "mynet.huber",
    ],
)
def test_a_signature_read_from_the_source_is_that_of_the_object(path: str, folder: Path) -> None:
    add_code_paths([str(folder)])
    found = read_signature(path, [str(folder)])
    assert found is not None
    real = inspect.signature(locate(path))
    assert [(p.name, p.kind) for p in found[0].parameters.values()] == [
        (p.name, p.kind) for p in real.parameters.values()
    ]
    assert found[1] is isinstance(locate(path), type)


@pytest.mark.parametrize(
    "path", ["builtins.object", "no.such.module", "torch.nn.Nothing", "collections.OrderedDict", "mynet.NotAModule"]
)
def test_a_source_that_does_not_tell_gives_no_signature(path: str, folder: Path) -> None:
    assert read_signature(path, [str(folder)]) is None
