from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from dist_train.building.prepare import build_model
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.models import MLP, Cifar10Quick, DigitsCNN, LogisticRegression, MnistCNN
from dist_train.models.flops import forward_flops
from dist_train.models.layers import layer_table, output_shapes
from dist_train.models.transfer import (
    append_module,
    find_head,
    freeze,
    initialize,
    load_weights,
    match_parameters,
    replace_head,
)
from dist_train.models.weights import is_torchvision_name, read_file, read_torchvision


def refusal(call: Any, *arguments: Any, **named: Any) -> tuple[str, str]:
    """The key and message of the one mistake that a call is refused for."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **named)
    (problem,) = caught.value.problems
    return problem.key, problem.message


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("alexnet", "classifier.6"),
        ("vgg16", "classifier.6"),
        ("vgg11_bn", "classifier.6"),
        ("resnet18", "fc"),
        ("resnext50_32x4d", "fc"),
        ("densenet121", "classifier"),
        ("mobilenet_v3_small", "classifier.3"),
        ("efficientnet_b0", "classifier.1"),
        ("convnext_tiny", "classifier.2"),
        ("mnasnet0_5", "classifier.1"),
        ("shufflenet_v2_x0_5", "fc"),
        ("squeezenet1_1", "classifier.1"),
        ("vit_b_16", "heads.head"),
        ("swin_t", "head"),
    ],
)
def test_the_head_of_a_torchvision_model_is_found_and_replaced(name: str, head: str) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
        assert find_head(model) == head
        assert replace_head(model, head, 7) == f"head {head}: 1000 -> 7 outputs"
        size = 64 if name != "vit_b_16" else 224
        assert model.eval()(torch.empty(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (MLP(4, [8], 2), "layers.3"),
        (DigitsCNN(), "classifier.2"),
        (MnistCNN(), "fc2"),
        (Cifar10Quick(), "model.8"),
        (LogisticRegression(), "features"),
    ],
)
def test_the_heads_of_the_courses_networks_are_found(model: nn.Module, head: str) -> None:
    assert find_head(model) == head


def test_a_new_head_keeps_what_the_old_one_was_like() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False, dtype=torch.float64))
    replace_head(model, "0", 5)
    assert model[0].bias is None
    assert model[0].weight.dtype == torch.float64
    assert model[0].weight.shape == (5, 4)


def test_a_head_that_does_not_fit_is_refused_with_names() -> None:
    key, message = refusal(find_head, models.resnet18(), "fcc")
    assert key == "transfer.head.at"
    assert "ResNet has no layer 'fcc'" in message
    assert "fc" in message.split("names look like ")[1].split(", ")
    _, message = refusal(find_head, Cifar10Quick(), "model")
    assert message == "expected a Linear or Conv2d layer, but model is a Sequential; did you mean model.8?"
    key, message = refusal(find_head, nn.Sequential(nn.ReLU()))
    assert key == "transfer.head"
    assert "no linear layer" in message


# --- appending -------------------------------------------------------------------------------------------------------


def test_a_module_is_appended_as_the_course_does_with_vgg() -> None:
    with torch.device("meta"):
        model = models.vgg16()
        line = append_module(model, "classifier", "add_linear", nn.Linear(1000, 10))
        assert model.eval()(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    assert line == "appended classifier.add_linear: Linear"
    assert list(model.state_dict())[-2:] == ["classifier.add_linear.weight", "classifier.add_linear.bias"]


def test_what_can_not_be_appended_is_refused() -> None:
    model = Cifar10Quick()
    key, message = refusal(append_module, model, "modle", "last", nn.Linear(10, 2))
    assert (key, message.split("names look like ")[1].split(", ")[0]) == ("transfer.append.at", "model")
    key, message = refusal(append_module, model, "model.8", "last", nn.Linear(10, 2))
    assert key == "transfer.append.at"
    assert message.startswith("expected a Sequential")
    assert message.endswith("those of this model are model")
    assert refusal(append_module, model, "model", "0", nn.Linear(10, 2))[0] == "transfer.append.name"
    key, message = refusal(append_module, model, "model", "last", nn.Linear(1000, 2))
    assert (key, message) == (
        "transfer.append.module",
        "the last linear layer of model has 10 outputs, but this takes 1000 inputs",
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_are_taken_whole_and_under_the_prefixes_of_other_tools() -> None:
    source = DigitsCNN()
    state = source.state_dict()
    for content in (
        state,
        {f"module.{name}": value for name, value in state.items()},
        {"epoch": 3, "state_dict": {f"model._orig_mod.{name}": value for name, value in state.items()}},
        {"model_state_dict": state, "optimizer_state_dict": {}},
        {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
    ):
        model = DigitsCNN()
        load_weights(model, content, "file.pt")
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_a_table_and_strictness_is_the_choice() -> None:
    state = DigitsCNN(classes=7).state_dict()
    state["classifer.2.weight"] = state.pop("classifier.2.weight")
    state["extra"] = torch.zeros(3)
    model = DigitsCNN()
    before = copy.deepcopy(model.state_dict())
    key, message = refusal(load_weights, model, state, "seven.pt")
    assert key == "transfer.weights"
    lines = [" ".join(line.split()) for line in message.splitlines()]
    assert "transfer.strict=false" in message
    assert "classifier.2.weight (10, 1024) - not in the file" in lines
    assert "classifer.2.weight - (7, 1024) not in the model" in lines
    assert "classifier.2.bias (10,) (7,) different shape" in lines
    assert "extra - (3,) not in the model" in lines
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "nothing was changed"
    notes = load_weights(model, state, "seven.pt", strict=False)
    assert notes[0] == "12 of 14 tensors from seven.pt"
    assert len(notes) == 1 + 1 + 4
    assert torch.equal(model.features[0].weight, state["features.0.weight"])
    assert torch.equal(model.classifier[2].bias, before["classifier.2.bias"])


def test_a_layer_that_will_be_replaced_need_not_fit() -> None:
    state = DigitsCNN(classes=7).state_dict()
    assert load_weights(DigitsCNN(), state, "seven.pt", replaced="classifier.2") == ["12 of 14 tensors from seven.pt"]
    assert refusal(load_weights, DigitsCNN(), state, "seven.pt", replaced="features.0")[0] == "transfer.weights"


def test_weights_of_another_model_and_no_weights_at_all_are_refused() -> None:
    _, message = refusal(load_weights, DigitsCNN(), MnistCNN().state_dict(), "mnist.pt", strict=False)
    assert message.startswith(
        "0 of the model's 14 tensors match one in mnist.pt; these are the weights of another model"
    )
    for content in ({}, [1], {"a": 3}, DigitsCNN().state_dict()["features.0.weight"]):
        assert (
            "expected a state_dict (names and tensors) in x.pt"
            in refusal(load_weights, DigitsCNN(), content, "x.pt")[1]
        )


def test_files_of_both_formats_are_read_from_disk_and_url(tmp_path: Path) -> None:
    import fsspec
    from safetensors.torch import save

    state = DigitsCNN().state_dict()
    (tmp_path / "a.pt").write_bytes(saved(state))
    (tmp_path / "a.safetensors").write_bytes(save(state))
    fsspec.filesystem("memory").pipe_file("/weights/a.pth", saved(state))
    for place in (f"{tmp_path}/a.pt", f"{tmp_path}/a.safetensors", "memory://weights/a.pth", f"file://{tmp_path}/a.pt"):
        read = read_file(place)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], value) for name, value in state.items())


def test_files_that_can_not_be_read_are_named_and_no_code_of_theirs_runs(tmp_path: Path) -> None:
    (tmp_path / "whole.pt").write_bytes(saved(DigitsCNN()))
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    assert "holds more than tensors" in refusal(read_file, f"{tmp_path}/whole.pt")[1]
    assert refusal(read_file, f"{tmp_path}/evil.pt")[0] == "transfer.weights"
    assert not (tmp_path / "ran").exists()
    for name in ("bad.pt", "bad.safetensors"):
        assert name in refusal(read_file, f"{tmp_path}/{name}")[1]
    assert refusal(read_file, f"{tmp_path}/whle.pt")[1] == (
        f"there is no file or directory {tmp_path}/whle.pt; did you mean {tmp_path}/whole.pt?"
    )


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_weights_by_torchvisions_name_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there: no network
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    cache = tmp_path / "hub" / "checkpoints"
    _, message = refusal(read_torchvision, "ResNet18_Weights.IMAGENET1K_V1", "resnet18")
    assert "without a network put that file at " + str(cache / "resnet18-f37072fd.pth") in message
    state = models.resnet18().state_dict()
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "resnet18-f37072fd.pth").write_bytes(saved(state))
    for name in ("ResNet18_Weights.IMAGENET1K_V1", "ResNet18_Weights.DEFAULT", "DEFAULT", "IMAGENET1K_V1"):
        assert is_torchvision_name(name)
        assert torch.equal(read_torchvision(name, "resnet18")["fc.bias"], state["fc.bias"])
    (cache / "resnet18-f37072fd.pth").write_bytes(saved({"fc.bias": Evil(str(tmp_path / "ran"))}))
    _, message = refusal(read_torchvision, "DEFAULT", "resnet18")
    assert "resnet18-f37072fd.pth is refused: it holds more than tensors" in message
    config = load_config(None, ["model={_target_: torchvision.models.resnet18, weights: DEFAULT}"])
    assert "UnpicklingError: Weights only load failed" in refusal(build_model, config)[1]
    assert not (tmp_path / "ran").exists()
    assert "did you mean ResNet18_Weights.IMAGENET1K_V1?" in refusal(read_torchvision, "IMAGENET1K_V2", "resnet18")[1]
    assert "torchvision has no weights" in refusal(read_torchvision, "ResNet19_Weights.DEFAULT", "resnet18")[1]
    assert not any(is_torchvision_name(name) for name in ("runs/digits", "a.pt", "s3://bucket/x", "weights"))


# --- freezing and first values ---------------------------------------------------------------------------------------


def test_patterns_match_parameters_modules_and_classes() -> None:
    model = models.resnet18()
    everything = [name for name, _ in model.named_parameters()]
    assert match_parameters(model, ["*"], "k") == everything
    assert match_parameters(model, ["fc"], "k") == match_parameters(model, ["fc.*"], "k") == ["fc.weight", "fc.bias"]
    assert match_parameters(model, ["Linear.weight"], "k") == ["fc.weight"]
    stages = match_parameters(model, ["layer[1-2]"], "k")
    assert stages == [name for name in everything if name.startswith(("layer1.", "layer2."))]
    norms = match_parameters(model, ["BatchNorm2d"], "k")
    assert len(norms) == 40
    assert all("bn" in name or "downsample.1" in name for name in norms)
    key, message = refusal(match_parameters, model, ["fc", "layer9"], "transfer.freeze")
    assert key == "transfer.freeze"
    assert message.startswith("layer9 matches no parameter of ResNet; names look like layer")


def test_frozen_norms_keep_their_statistics_whoever_calls_train() -> None:
    torch.manual_seed(0)
    model = DigitsCNN()
    freeze(model, ["features.[0-3]"])
    first, second = model.features[1], model.features[4]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "features.0.weight", "features.1.weight", "features.1.bias", "features.3.weight"
    ]  # fmt: skip
    for train in (
        lambda: model,
        model.train,
        lambda: nn.Sequential(model).train(),
        lambda: copy.deepcopy(model).train(),
    ):
        got = train()
        norms = [module for module in got.modules() if isinstance(module, nn.BatchNorm2d)]
        assert [module.training for module in norms] == [False, True]
        assert got.training
    before = [first.running_mean.clone(), second.running_mean.clone()]
    model(torch.randn(8, 1, 8, 8))
    assert torch.equal(first.running_mean, before[0])
    assert not torch.equal(second.running_mean, before[1])
    model.eval()
    assert not any(module.training for module in model.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).train()
    assert [m.training for m in converted.modules() if isinstance(m, nn.SyncBatchNorm)] == [False, True]
    half = DigitsCNN()
    freeze(half, ["features.1.weight"])
    assert half.features[1].training, "a norm with a part that trains isn't frozen"


def test_freezing_everything_is_refused() -> None:
    key, message = refusal(freeze, DigitsCNN(), ["features", "classifier"])
    assert (key, message) == (
        "transfer.freeze",
        "features, classifier freezes every parameter: nothing is left to train",
    )


def test_a_whole_module_with_frozen_parts_is_loaded_by_torch_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    replace_head(model, "3", 3)
    freeze(model, ["0", "BatchNorm2d"])
    inputs = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.save({"inputs": inputs, "outputs": model.eval()(inputs)}, tmp_path / "expected.pt")
    torch.save(model, tmp_path / "whole.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(Path(__file__).parent / "programs" / "load_plain.py")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120)


def test_first_values_are_filled_by_name() -> None:
    model = DigitsCNN()
    initialize(model, ["Conv2d.weight"], lambda tensor: nn.init.constant_(tensor, 0.5), "model_init.0")
    assert all(bool((model.features[k].weight == 0.5).all()) for k in (0, 3))
    assert not bool((model.classifier[2].weight == 0.5).any())
    assert model.features[0].weight.requires_grad
    key, message = refusal(initialize, model, ["features.*"], nn.init.kaiming_normal_, "model_init.1")
    assert key == "model_init.1"
    assert message.startswith("it can't initialize features.1.weight (32,): Fan in")
    assert refusal(initialize, model, ["head"], nn.init.zeros_, "model_init.2")[0] == "model_init.2.match"


# --- the table of layers ---------------------------------------------------------------------------------------------


def test_layers_are_shown_in_short_and_in_full() -> None:
    model = Cifar10Quick()
    freeze(model, ["model.[0-4]"])
    short = layer_table(model)
    assert short[0].split() == ["model.0", "Conv2d", "(32,", "3,", "5,", "5)", "2,432", "frozen"]
    assert len(short) == 5
    shapes = output_shapes(model, lambda: model(torch.zeros(1, 3, 32, 32)))
    assert model.training
    full = layer_table(model, full=True, shapes=shapes)
    assert [line.split()[0] for line in full] == [f"model.{k}" for k in range(9)]
    assert full[1].split() == ["model.1", "MaxPool2d", "(1,", "32,", "16,", "16)"]
    flops = forward_flops(model, lambda: model(torch.zeros(1, 3, 32, 32)))
    counted = layer_table(model, full=True, shapes=shapes, flops=flops)
    assert counted[0].endswith(f"{2 * 32 * 32 * 32 * 3 * 25:,} FLOPs, frozen")
    assert counted[1:2] == full[1:2]
    many = layer_table(nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)]))
    assert many[-1] == "and 8 more; debug.layers=true shows all"
    assert len(many) == 13
