"""What a run keeps of the code and the objects that it was trained with, and what it says when they are others by now."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dist_train import load, train
from dist_train.callbacks import Callback
from dist_train.config.errors import ConfigError
from dist_train.run.start import Start
from dist_train.runtime.storage import open_storage
from dist_train.training.callbacks import callback_states, load_callback_states


class Counter(Callback):
    def __init__(self, by: int = 1) -> None:
        self.by, self.value = by, 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Other(Counter):
    pass


def spec(kind: type[Counter], by: int) -> dict[str, Any]:
    return {"_target_": kind.__qualname__, "by": by}


@pytest.mark.parametrize(
    ("after", "values"),
    [
        ([(Counter, 1), (Counter, 2), (Other, 3)], [10, 20, 30]),
        ([(Other, 3), (Counter, 2), (Counter, 1)], [30, 20, 10]),  # reordered
        ([(Counter, 2), (Other, 3)], [20, 30]),  # the first is gone
        ([(Other, 9), (Counter, 1), (Counter, 2)], [30, 10, 20]),  # other arguments of the only one
        ([(Counter, 7), (Counter, 1), (Counter, 2), (Other, 3)], [0, 10, 20, 30]),  # a new one
        ([(Counter, 7), (Counter, 8)], [0, 0]),  # nobody can tell which was which
    ],
)
def test_a_callbacks_state_finds_it_again(after: list[tuple[type[Counter], int]], values: list[int]) -> None:
    def built(pairs: list[tuple[type[Counter], int]]) -> tuple[list[Counter], list[Any]]:
        return [kind(by) for kind, by in pairs], [spec(*pair) for pair in pairs]

    before, specs = built([(Counter, 1), (Counter, 2), (Other, 3)])
    for callback in before:
        callback.value = 10 * callback.by
    saved = callback_states(before, specs)
    callbacks, specs = built(after)
    notes: list[str] = []
    load_callback_states(callbacks, specs, saved, notes.append)
    assert [callback.value for callback in callbacks] == values
    assert len(notes) == (2 if values == [0, 0] else 0)


def test_states_that_an_earlier_version_saved_by_position_are_taken() -> None:
    callback = Counter()
    load_callback_states([callback], [spec(Counter, 1)], [{"value": 5}, {}], print)
    assert callback.value == 5


CONFIG = """
run: {name: r}
data:
  train: {_target_: dist_train.data.Digits, split: train, flat: true}
  test: {_target_: dist_train.data.Digits, split: test, flat: true}
model: {_target_: records_net.Net}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
trainer: {duration: 3step}
tracking: {tensorboard: false}
distributed: {device: cpu}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config beside its code, in the working directory, whose modules are gone from this process afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(CONFIG)
    shutil.copy(Path(__file__).parent / "programs" / "records_net.py", tmp_path)
    (tmp_path / "helper.py").write_text("WIDTH = 10\n")
    (tmp_path / "unused.py").write_text("")
    monkeypatch.setattr(sys, "path", sys.path[:])
    forget()
    return tmp_path


def forget() -> None:
    for name in ("records_net", "helper"):
        sys.modules.pop(name, None)


def starts(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "start"]


def test_changed_code_is_named_on_resume_and_on_a_completed_run_which_imports_nothing(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = project / "runs" / "r"
    stopped = train("c.yaml", "trainer.stop_at=1step")
    printed = capsys.readouterr()
    assert "the code has changed" not in printed.err
    assert f"{run}/curves.png" in printed.out
    assert (run / "curves.png").stat().st_size > 1000
    assert f"{run}/report.html" in printed.out
    assert "Confusion matrix" not in (run / "report.html").read_text()
    assert sorted(starts(run)[0]["code"]) == ["helper.py", "records_net.py"]

    (project / "helper.py").write_text("WIDTH = 5 + 5\n")
    (project / "unused.py").write_text("# changed\n")
    done = train("c.yaml")
    printed = capsys.readouterr()
    assert (
        f"the code has changed since {run} was last started: helper.py. The run resumes with the code as it is now"
        in printed.err
    )
    assert done["seconds"] > stopped["seconds"]
    assert "tensorboard" not in printed.out
    assert len(starts(run)) == 2

    forget()
    (run / "report.html").unlink()  # as if it had been killed before
    assert train("c.yaml")["weights_sha256"] == done["weights_sha256"]
    assert "the code has changed" not in capsys.readouterr().err
    assert "Confusion matrix" in (run / "report.html").read_text()

    forget()
    (project / "records_net.py").write_text("raise RuntimeError('imported')\n")
    assert train("c.yaml") == done
    printed = capsys.readouterr()
    assert (
        f"the code has changed since {run} was trained: records_net.py. This is the result of the code before"
        in printed.err
    )
    assert "records_net" not in sys.modules
    assert len(starts(run)) == 2


class Scaled(nn.Module):
    def __init__(self, scale: float = 1.0, width: int = 3) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, width), scale

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs) * self.scale


def live(**changed: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.rand(40, 4, generator=generator), torch.arange(40) % 3
    parts = {
        "model": Scaled(),
        "loss": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "data": {
            "train": TensorDataset(inputs, targets),
            "val": TensorDataset(inputs, targets),
            "global_batch_size": 8,
        },
        "trainer": {"duration": "12step", "ema_decay": 0.5, "evaluate_every": "3step"},
        "tracking": {"tensorboard": False, "report": False},
        "run": {"name": "cell"},
    }
    return {**parts, **changed}


def other_data(change: Any) -> dict[str, Any]:
    config = live()
    inputs, targets = config["data"]["train"].tensors
    inputs, targets = change(inputs.clone(), targets)
    return {**config["data"], "train": TensorDataset(inputs, targets)}


def last_differs(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    inputs[-1] += 1
    return inputs, targets


def test_a_cell_that_is_run_again_gives_its_result_or_names_what_is_another_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = live()
    result = train(first)
    saved = torch.load("runs/cell/model.pt", weights_only=True)
    raw = torch.load(max(Path("runs/cell/checkpoints").glob("step-*")) / "model.pt", weights_only=True)
    assert not torch.equal(raw["linear.weight"], saved["linear.weight"])
    again = live()
    for config in (first, again):  # the same objects, and others that are the same
        assert train(config)["weights_sha256"] == result["weights_sha256"]
        assert all(torch.equal(value, saved[name]) for name, value in config["model"].state_dict().items())

    class Doubled(Scaled):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    Doubled.__qualname__, Doubled.__name__ = Scaled.__qualname__, Scaled.__name__
    others = {
        "model: another settings": {"model": Scaled(2.0)},
        "model: another representation, parameters": {"model": Scaled(width=4)},
        "model: another code": {"model": Doubled()},
        "loss: another buffers": {"loss": nn.CrossEntropyLoss(torch.ones(3))},
        "optimizer: another representation": {"optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.9)},
        "data.train: other samples": {"data": other_data(last_differs)},
        "data.train: another length 40 -> 39": {"data": other_data(lambda x, y: (x[:-1], y[:-1]))},
    }
    for words, changed in others.items():
        with pytest.raises(ConfigError) as caught:
            train(live(**changed))
        assert words in str(caught.value)
        assert "run.name" in str(caught.value)
    assert len(starts(tmp_path / "runs" / "cell")) == 1

    train(live(run={"name": "stopped"}), "trainer.stop_at=3step")
    with pytest.raises(
        ConfigError, match=r"was started with other objects .*model: another settings.*accept_changes=true"
    ):
        train(live(run={"name": "stopped"}, model=Scaled(2.0)))
    assert train(live(run={"name": "stopped"}, model=Scaled(2.0)), "checkpoint.accept_changes=true")["step"] == 12


def test_a_test_row_is_of_the_step_whose_weights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = live(optimizer={"_target_": "torch.optim.SGD", "lr": 3.0}, run={"name": "kept"})
    config["data"] = {**config["data"], "test": config["data"]["val"]}
    result = train(config)
    rows = [json.loads(line) for line in Path("runs/kept/metrics.jsonl").read_text().splitlines()]
    test = next(row for row in rows if row["split"] == "test")
    assert result["kept_step"] < result["step"]
    assert (test["step"], test["samples"], test["epoch"]) == (
        result["kept_step"],
        8 * result["kept_step"],
        -(-result["kept_step"] // 5),
    )
    assert result["metrics"]["test"]["loss"] == result["metrics"]["val"]["loss"]
    kept = torch.load("runs/kept/model.pt", weights_only=True)
    for checkpoint, is_kept in ((None, True), ("best", True), ("last", False)):
        loaded = load("runs/kept", checkpoint, model=Scaled()).state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in loaded.items()) == is_kept


class Capped(nn.Module):
    def __init__(self, most: float) -> None:
        super().__init__()
        self.layer, self.most = nn.Linear(2, 1), most

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).clamp(max=self.most)


def test_an_infinite_number_in_the_config_is_saved_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "data": {"train": TensorDataset(torch.ones(8, 2), torch.ones(8, 1)), "global_batch_size": 4},
        "model": {"_target_": Capped, "most": float("inf")},
        "loss": nn.MSELoss(),
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "trainer": {"duration": "1ep"},
        "run": {"name": "capped"},
        "tracking": {"tensorboard": False, "report": False},
    }
    assert train(config)["step"] == 2
    Path("runs/capped/config.yaml").unlink()  # what is in the manifest counts
    assert train({**config, "trainer": {"duration": "2ep"}})["step"] == 4


def test_the_start_after_a_kill_says_how_far_the_checkpoints_show_that_the_last_one_got(tmp_path: Path) -> None:
    """status.json may be ten seconds old, and says 0 of a run that was killed before."""
    said: list[str] = []
    (tmp_path / "attempts.jsonl").write_text('{"event": "start", "attempt": 0, "host": "a", "pid": 1}\n')
    start: Any = SimpleNamespace(
        attempt=1,
        run=SimpleNamespace(storage=open_storage(tmp_path), read_json=lambda name: {"step": 3}),
        console=SimpleNamespace(warn=said.append),
    )
    Start._warn_of_unfinished(start)
    (tmp_path / "checkpoints" / "step-00000120").mkdir(parents=True)
    Start._warn_of_unfinished(start)
    assert [re.findall("after step (.*):", text) for text in said] == [["3 or later"], ["120 or later"]]
