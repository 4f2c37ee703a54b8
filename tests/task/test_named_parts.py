"""`data.inputs` and `data.target`: what the model and the loss get of batches whose parts have names."""

from __future__ import annotations

import collections
import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import result
from torch import Tensor, nn
from torch.utils.data import Dataset

from dist_train import train
from dist_train.commands import evaluate, predict
from dist_train.config.errors import ConfigError
from dist_train.config.load import load_config
from dist_train.data.reading import make_batch
from dist_train.task.batch import NamedParts, split_batch
from dist_train.views.collect import sample_picture


@dataclasses.dataclass(frozen=True)
class Sample:
    ids: Any
    mask: Any
    label: Any


class Encoding(collections.UserDict[str, Any]):
    """As transformers' BatchEncoding."""


IDS, MASK, LABEL = torch.arange(6).view(2, 3), torch.ones(2, 3), torch.tensor([1, 0])
VALUES = {"ids": IDS, "mask": MASK, "label": LABEL}
Named = collections.namedtuple("Named", VALUES)


@pytest.mark.parametrize(
    "batch",
    [
        VALUES,
        Encoding(VALUES),
        Sample(**VALUES),
        types.SimpleNamespace(**VALUES),
        types.MappingProxyType(VALUES),
        Named(**VALUES),
    ],
)
def test_the_model_gets_inputs_by_name_and_the_loss_the_target(batch: Any) -> None:
    inputs, target = NamedParts(["ids", "mask"], "label")(batch)
    assert list(inputs) == ["ids", "mask"]
    assert inputs["ids"] is IDS
    assert target is LABEL


def test_a_single_input_goes_by_position_and_paths_lead_inside() -> None:
    nested = {"text": Encoding(ids=IDS), "views": [MASK, LABEL], "meta": types.SimpleNamespace(label=LABEL)}
    assert NamedParts("text.ids", "meta.label")(nested) == (IDS, LABEL)
    inputs, _ = NamedParts(["text.ids", "views.0"], "views.1")(nested)
    assert inputs["ids"] is IDS
    assert inputs["0"] is MASK


def test_a_target_may_be_missing_only_where_nothing_is_compared_with_it() -> None:
    parts = NamedParts("ids", "label")
    assert parts({"ids": IDS}, labeled=False) == (IDS, None)
    with pytest.raises(ValueError, match=r"data\.target: label: the batch has no label; it has ids"):
        parts({"ids": IDS})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("id", r"data\.inputs: id: the batch has no id; it has ids, mask, label"),
        ("ids.0", r"ids\.0: ids of the batch has no 0; it is int64 \(2, 3\)"),
        ("keys", "the batch has no keys"),  # a method of the mapping is no part of the sample
    ],
)
def test_a_wrong_path_is_answered_with_what_is_there(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NamedParts(path, "label")(VALUES)


@pytest.mark.parametrize("batch", [VALUES, Encoding(VALUES), Sample(**VALUES)])
def test_without_the_keys_a_batch_with_names_is_answered_with_them(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.inputs: \[ids, mask\].*data\.target: label"):
        split_batch(batch)


def test_dataclasses_are_collated_field_by_field() -> None:
    batch = make_batch([Sample(torch.tensor([k]), {"a": float(k)}, k) for k in range(3)])
    assert type(batch) is Sample
    assert batch.ids.tolist() == [[0], [1], [2]]
    assert batch.mask["a"].tolist() == [0, 1, 2]
    assert batch.label.tolist() == [0, 1, 2]


class Words(Dataset[Any]):
    """Samples as dicts, UserDicts or dataclasses; without labels for predictions."""

    def __init__(self, kind: str = "dict", labels: bool = True, length: int = 24) -> None:
        generator = torch.Generator().manual_seed(length)
        self.x, self.kind, self.labels = torch.randn(length, 4, generator=generator), kind, labels

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        x, name = self.x[index], f"sample {index}"
        sample = {"x": x, "scale": x[:1].abs(), "label": int(x.sum() > 0), "name": name}
        if not self.labels:
            del sample["label"]
        return {
            "dict": dict,
            "UserDict": Encoding,
            "dataclass": lambda given: Sample(given["x"], name, given["label"]),
        }[self.kind](sample)


class ByName(nn.Module):
    """Its arguments are in another order than in samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        return self.layer(x) * scale


def config_of(folder: Path, kind: str, **data: Any) -> dict[str, Any]:
    here = {"code_paths": [str(Path(__file__).parent)], "dir": str(folder), "name": "run"}
    words = {"_target_": "test_named_parts.Words", "kind": kind}
    return {
        "run": here,
        "data": {"train": words, "val": {**words, "length": 10}, "global_batch_size": 8, "num_workers": 0, **data},
        "model": {"_target_": "test_named_parts.ByName"},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "metrics": ["accuracy"],
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5},
        "trainer": {"duration": "3ep"},
        "tracking": {"tensorboard": False, "report": False},
    }


@pytest.mark.parametrize("kind", ["dict", "UserDict"])
def test_samples_with_names_are_trained_evaluated_and_predicted(tmp_path: Path, kind: str, capsys: Any) -> None:
    config = config_of(tmp_path, kind, inputs=["x", "scale"], target="label")
    train(config)
    run, data = tmp_path / "run", Words(kind, length=10)
    model = ByName()
    model.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    scores = model(data.x[:, :1].abs(), data.x).detach()
    labels = (data.x.sum(1) > 0).long()
    metrics = result(run)["metrics"]["val"]
    assert metrics["loss"] == pytest.approx(float(nn.functional.cross_entropy(scores, labels)))
    assert metrics["accuracy"] == float((scores.argmax(1) == labels).double().mean())
    assert evaluate.main(["--run", str(run)]) == 0
    assert f"{metrics['accuracy']:.4g}" in capsys.readouterr().out

    table = tmp_path / "table.csv"
    for labeled in (True, False):
        assert predict.main(["--run", str(run), "--output", str(table), f"data.val.labels={str(labeled).lower()}"]) == 0
        rows = [line.split(",") for line in table.read_text().splitlines()]
        assert ("target" in rows[0]) is labeled
        assert [int(row[rows[0].index("prediction")]) for row in rows[1:]] == scores.argmax(1).tolist()


def test_a_single_field_of_a_dataclass_goes_by_position(tmp_path: Path) -> None:
    config = config_of(tmp_path, "dataclass", inputs="ids", target="label")
    config["model"] = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2}
    train(config)
    assert result(tmp_path / "run")["step"] == 9


def test_training_on_samples_with_names_without_the_keys_says_which_to_set(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"data\.inputs: \[x, scale, name\].*data\.target: label"):
        train(config_of(tmp_path, "dict"))


class Pairs(Words):
    """The same samples as (inputs, target)."""

    def __getitem__(self, index: int) -> Any:
        sample: Any = super().__getitem__(index)
        return sample["x"], sample["label"]


def test_a_task_gets_inputs_and_target_by_the_same_keys(tmp_path: Path) -> None:
    """Hugging Face's samples for a ready task."""
    found = []
    for name, keys in (("dict", {"inputs": "x", "target": "label"}), ("pairs", {})):
        config = config_of(tmp_path, "dict", **keys)
        config["run"] = {**config["run"], "name": name}
        if name == "pairs":
            for split in ("train", "val"):
                config["data"][split] = {**config["data"][split], "_target_": "test_named_parts.Pairs"}
        linear = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2}
        config |= {"model": linear, "task": {"_target_": "dist_train.tasks.Distillation", "teacher": linear}}
        del config["loss"]
        train(config)
        found.append(result(tmp_path / name))
    assert found[0]["weights_sha256"] == found[1]["weights_sha256"]
    assert found[0]["metrics"]["val"] == found[1]["metrics"]["val"]


def test_the_keys_are_refused_alone(tmp_path: Path) -> None:
    for data, message in [
        ({"inputs": "x"}, r"data\.inputs: this needs data\.target too"),
        ({"target": "y"}, r"data\.target: this needs data\.inputs too"),
        ({"inputs": ["a.x", "b.x"], "target": "y"}, r"two of them would be the model's argument x"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(config_of(tmp_path, "dict", **data))


def test_reports_show_the_only_image_of_a_sample_with_names() -> None:
    image, data = torch.rand(3, 5, 5), {"image": torch.zeros(0), "name": "x", "label": 1}
    assert sample_picture(0, [{**data, "image": image}], 0).shape == (5, 5, 3)
    assert sample_picture(0, [{**data, "image": image, "mask": image}], 0) is None


def test_augmentations_want_a_single_input(tmp_path: Path) -> None:
    config = config_of(tmp_path, "dict", inputs=["x", "scale"], target="label")
    config["data"]["augment"] = [{"_target_": "dist_train.data.RandomErasing"}]
    with pytest.raises(Exception, match=r"two tensors, found tuple\[\{x: float32.*single part in data\.inputs"):
        train(config)
