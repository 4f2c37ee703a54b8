"""What an editor offers and marks: by jsonschema, and by the real yaml-language-server."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
from editor import MISSING, Editor, missing
from runs import ROOT

from dist_train.config.source import Place, Reader
from dist_train.main import main

sys.path.insert(0, str(ROOT / "docs"))
make_schema = importlib.import_module("make_schema")
FILE = ROOT / "dist_train/config/schema.json"
SCHEMA = json.loads(FILE.read_text())
HEAD = "# yaml-language-server: $schema=../dist_train/config/schema.json\n"
FOLDERS = ("configs", "tests/zoo", "tests/config", "tests/programs", "dist_train/templates")
GOOD = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.yaml"))
}
GOOD["default.yaml"] = (ROOT / "dist_train/config/default.yaml").read_text()
for page in sorted((ROOT / "docs").rglob("*.md")):
    for number, (name, text) in enumerate(re.findall(r"^```yaml ?(\S*)\n(.*?)^```$", page.read_text(), re.M | re.S)):
        if name not in ("sweep.yaml", "job.yaml"):  # wandb's and Kubernetes' own formats
            GOOD[f"{page.name}:{number}"] = text
# Each with the comment `# ! KEY: message` behind what is wrong.
BAD = dict(re.findall(r"^=== (.*)\n((?:(?!===).*\n)*)", (ROOT / "tests/config/bad_configs.txt").read_text(), re.M))


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    if missing():
        pytest.skip(MISSING)
    found = Editor(ROOT / "configs")
    yield found
    found.close()


def test_the_editor_marks_nothing_in_configs_that_are_right(editor: Editor) -> None:
    assert len(GOOD) > 60
    marked = zip(GOOD, editor.diagnostics([HEAD + text for text in GOOD.values()]))
    assert [(name, found) for name, found in marked if found] == []


def test_the_editor_marks_mistakes_where_they_are_and_nothing_else(editor: Editor) -> None:
    """Of the corpus that the loader is tested with. What needs more than a schema can say stays unmarked."""
    marked = dict(zip(BAD, editor.diagnostics([HEAD + text for text in BAD.values()])))
    for name, found in marked.items():
        wrong = {number for number, line in enumerate(BAD[name].splitlines(), 2) if "# !" in line}
        assert all(wrong & {line - 1, line, line + 1} for line, _ in found), (
            name,
            found,
        )  # where a block begins or ends
    assert sum(map(bool, marked.values())) > 55


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {_target_: torch.optim.SGD, lrr: 0.1}", "Property lrr is not allowed."),
        ("optimizer: {one: {_target_: torch.optim.SGD, lrr: 0.1}}", "Property lrr is not allowed."),
        ("optimizer: {_target_: torch.optim.SGD, groups: [{match: a, lrr: 1}]}", "Property lrr is not allowed."),
        ("scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: a}", "Incorrect type. Expected one of"),
        ("metrics: [{metric: accuracy, topp: 3}]", "Property topp is not allowed."),
        ("data: {train: {root: 1}}", 'Missing property "_target_".'),
        ("trainer: {duration: 20}", "Expected a number and a unit, like 20ep, 500step or 10min."),
    ],
)
def test_the_editor_says_what_is_wrong(editor: Editor, text: str, message: str) -> None:
    ((found,),) = editor.diagnostics([HEAD + text + "\n"])
    assert found[0] == 2
    assert found[1].startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {_target_: my.Optimizer, whatever: 1, groups: [{match: a, own: 1}]}",
        "scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: total_steps - 2ep, every: 1step, warmup: 5step}",
        "scheduler: {_target_: torch.optim.lr_scheduler.ChainedScheduler, schedulers: [{_target_: my.Schedule, a: 1}]}",
        "extends: a.yaml\noptimizer: {lr: 0.1}\nmodel: {width: 3}\nloss: null\ntrainer: {stop_when: {patience: 3ep}}",
        "loss: {_target_: torch.nn.CrossEntropyLoss, weight: [1, 2], label_smoothing: 1e-1}",
        "metrics: [accuracy, {_target_: torchmetrics.F1Score, task: binary, of: argmax}, {metric: f1, average: none}]",
    ],
)
def test_names_outside_the_lists_and_values_of_a_base_stay_allowed(editor: Editor, text: str) -> None:
    assert editor.diagnostics([HEAD + text + "\n"]) == [[]]


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("optimizer:\n  _target_: |\n", {"torch.optim.SGD", "torch.optim.AdamW"}),
        ("optimizer:\n  _target_: torch.optim.AdamW\n  |\n", {"lr", "betas", "groups", "layer_decay"}),
        ("optimizer: {_target_: torch.optim.SGD, l|}\n", {"lr", "momentum", "groups"}),
        (
            "optimizer:\n  _target_: torch.optim.SGD\n  groups:\n    - |\n",
            {"match", "ndim_below", "lr", "weight_decay"},
        ),
        ("optimizer:\n  muon:\n    _target_: torch.optim.Muon\n    |\n", {"lr", "ns_steps", "match"}),
        ("scheduler:\n  _target_: |\n", {"torch.optim.lr_scheduler.StepLR", "dist_train.schedules.WarmupCosine"}),
        (
            "scheduler:\n  _target_: dist_train.schedules.WarmupCosine\n  |\n",
            {"warmup_steps", "every", "metric", "horizon"},
        ),
        ("scheduler:\n  _target_: torch.optim.lr_scheduler.StepLR\n  every: |\n", {"1step", "1ep"}),
        ("loss: {_target_: torch.nn.|}\n", {"torch.nn.CrossEntropyLoss", "torch.nn.MSELoss"}),
        ("model:\n  _target_: dist_train.models.MLP\n  |\n", {"hidden", "in_features"}),
        ("data:\n  train:\n    _target_: |\n", {"dist_train.data.Digits", "dist_train.data.ImageFolder"}),
        ("data:\n  train:\n    _target_: dist_train.data.CSV\n    |\n", {"path", "standardize"}),
        ("data:\n  augment:\n    - _target_: |\n", {"dist_train.data.RandomCrop", "dist_train.data.OneOf"}),
        ("metrics:\n  - |\n", {"accuracy", "_target_", "metric"}),
        ("metrics:\n  - metric: accuracy\n    |\n", {"top", "name", "of"}),
        ("task:\n  _target_: |\n", {"dist_train.tasks.LanguageModel"}),
        ("callbacks:\n  - _target_: |\n", {"dist_train.callbacks.Unfreeze"}),
    ],
)
def test_the_editor_offers_names_and_arguments(editor: Editor, text: str, offered: set[str]) -> None:
    assert offered <= editor.complete(HEAD + text).keys()


def test_what_is_offered_is_described_by_signature_and_docstring(editor: Editor) -> None:
    offered = editor.complete(HEAD + "optimizer:\n  _target_: torch.optim.SGD\n  |\n")
    lr = torch.optim.SGD([torch.zeros(1, requires_grad=True)]).defaults["lr"]
    assert offered["lr"]["documentation"] == f"(float | Tensor = {lr}) learning rate"
    assert offered["lr"]["insertText"] == f"lr: ${{1:{lr}}}"
    names = editor.complete(HEAD + "optimizer:\n  _target_: |\n")
    assert names["torch.optim.AdamW"]["documentation"].startswith("Implements AdamW algorithm")
    assert "params" not in offered


def test_a_new_project_has_its_schema_beside_it(editor: Editor, tmp_path: Path) -> None:
    assert main(["new", str(tmp_path / "my project")]) == 0
    text = (tmp_path / "my project/config.yaml").read_text()
    assert (tmp_path / "my project/dist_train.schema.json").read_bytes() == FILE.read_bytes()
    other = Editor(tmp_path / "my project")
    try:
        wrong, line = text.replace("duration: 30ep", "durations: 30ep"), text.partition("duration:")[0].count("\n") + 1
        assert other.diagnostics([text, wrong]) == [[], [(line, "Property durations is not allowed.")]]
    finally:
        other.close()


def test_arguments_are_those_of_the_signatures() -> None:
    assert sum(len(make_schema.targets(kind)) for kind in make_schema.KINDS) > 100
    for name, target in {"torch.optim.SGD": torch.optim.SGD, "torch.nn.HuberLoss": torch.nn.HuberLoss}.items():
        properties = make_schema.json_schema()["$defs"][name]["properties"]
        assert inspect.signature(target).parameters.keys() - {"params"} <= properties.keys()
        assert "params" not in properties


def test_another_validator_takes_the_right_configs_and_refuses_wrong_ones() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    checked = jsonschema.Draft202012Validator(SCHEMA)

    def errors(text: str) -> list[str]:
        node = Reader().parse(text, Place("file", 1, 1))
        assert node is not None, text
        return [error.message for error in checked.iter_errors(node.plain())]

    assert [(name, found) for name, text in GOOD.items() if (found := errors(text))] == []
    wrong = [name for name, text in BAD.items() if "YAML" not in text and "\t" not in text and errors(text)]
    assert len(wrong) > 55
