"""checkpoint.what=trained: the same run in less space, and a refusal wherever the frozen weights aren't those of then."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import rows, run_several
from torch import nn
from torch.utils.data import TensorDataset

from dist_train import load, train
from dist_train.commands import evaluate, export, predict
from dist_train.config.errors import ConfigError

DATA = TensorDataset(
    torch.randn(24, 4, generator=torch.Generator().manual_seed(0)),
    torch.randint(0, 2, (24,), generator=torch.Generator().manual_seed(1)),
)
QUIET = {"tensorboard": False, "report": False}


class Base(nn.Module):
    """A large body with a BatchNorm, a part that is tied to it, and a small head."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
        self.head = nn.Linear(64, 2)
        self.tied = self.body[2]
        with torch.no_grad():
            self.body[2].bias.add_(shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Follower(Base):
    """Whose frozen bias is a momentum encoder's: it follows the head's weights, behind autograd's back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.body[2].bias.data.mul_(0.9).add_(self.head.weight.detach().mean(), alpha=0.1)
        return super().forward(x)


def config(folder: Path, name: str, what: str = "trained", **sections: Any) -> dict[str, Any]:
    data = {"_target_": "test_frozen.data"}
    return {
        "run": {"name": name, "dir": str(folder), "code_paths": [str(Path(__file__).parent)]},
        "data": {"train": data, "val": data, "global_batch_size": 6},
        "model": {"_target_": "test_frozen.Base"},
        "transfer": {"freeze": ["body.2.*", "body.0.*"]},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "metrics": ["accuracy"],
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.2, "momentum": 0.9},
        "trainer": {"duration": "3ep", "log_every": "1step"},
        "checkpoint": {"what": what, "every": "1ep"},
        "tracking": QUIET,
    } | sections


def data() -> TensorDataset:
    return DATA


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def written(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


UNFREEZE = [{"_target_": "dist_train.callbacks.Unfreeze", "match": "body.0", "after": "6step"}]
KINDS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "thawed": {"callbacks": UNFREEZE},
    "followed": {"model": {"_target_": "test_frozen.Follower"}},
    "averaged": {"trainer": {"duration": "3ep", "log_every": "1step", "ema_decay": 0.8}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_run_that_saves_everything_also_stopped_and_resumed(kind: str, tmp_path: Path) -> None:
    train(config(tmp_path, "all", "all", **KINDS[kind]))
    train(config(tmp_path, "whole", **KINDS[kind]))
    for stop in ("5step", "9step", None):
        made = config(tmp_path, "stopped", **KINDS[kind])
        train({**made, "trainer": {**made["trainer"], "stop_at": stop}})
    expected = load(tmp_path / "all").state_dict()
    for name in ("whole", "stopped"):
        assert rows(tmp_path / name) == rows(tmp_path / "all")
        told = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("all", name)]
        assert told[0]["weights_sha256"] == told[1]["weights_sha256"]
        found = load(tmp_path / name).state_dict()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())
        plain = Base()
        torch.manual_seed(0)
        plain.__init__()  # type: ignore[misc]
        plain.load_state_dict(weights(tmp_path / name / "model.pt"), strict=False)
        kept = weights(tmp_path / "all" / "model.pt")
        assert all(torch.equal(value, kept[key]) for key, value in plain.state_dict().items())
    saved = weights(newest(tmp_path / "whole") / "model.pt")
    assert {"body.1.weight", "body.1.running_mean", "head.weight"} <= saved.keys()
    assert ("body.0.weight" in saved) == (kind == "thawed")
    assert ("body.2.bias" in saved) == ("tied.bias" in saved) == (kind == "followed")
    assert "body.2.weight" not in saved
    assert "tied.weight" not in saved
    sizes = [(newest(tmp_path / run) / "model.pt").stat().st_size for run in ("whole", "all")]
    assert sizes[0] < sizes[1] / 2


def test_other_frozen_weights_are_refused_wherever_weights_are_loaded(tmp_path: Path) -> None:
    made = config(tmp_path, "run")
    train({**made, "trainer": {"duration": "3ep", "stop_at": "5step"}})
    before = written(tmp_path)
    other = {**made, "model": {"_target_": "test_frozen.Base", "shift": 1.0}}
    accepted = {**made["checkpoint"], "accept_changes": True}
    said = r"model: .*step-0000000[45] holds trained weights only .* but body.2.bias is another one: expected the hash \w{16}"
    with pytest.raises(ConfigError, match=said):
        train({**other, "checkpoint": accepted})
    assert written(tmp_path) == before
    shifted = ["model.shift=1.0"]
    run = ["--run", str(tmp_path / "run")]
    for command, options in (
        (evaluate, ["--split", "val"]),
        (predict, ["--split", "val", "--output", str(tmp_path / "out.csv")]),
        (export, ["--output", str(tmp_path / "out.pt")]),
    ):
        with pytest.raises(ConfigError, match=said):
            command.main([*run, *options, *shifted])
        with redirect_stdout(io.StringIO()):
            assert command.main([*run, *options]) == 0
    assert weights(tmp_path / "out.pt").keys() == Base().state_dict().keys()
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "run", model=Base(1.0))
    with pytest.raises(ConfigError, match=r"checkpoint.what .*can't change within a run"):
        train(config(tmp_path, "run", "all"))


def test_weights_of_a_file_are_read_again_at_each_start_and_compared(tmp_path: Path) -> None:
    torch.manual_seed(7)
    torch.save(Base().state_dict(), tmp_path / "base.pt")
    transfer = {"freeze": ["body.*"], "weights": str(tmp_path / "base.pt")}
    made = config(tmp_path, "run", transfer=transfer)
    train({**made, "trainer": {"duration": "3ep", "stop_at": "5step"}})
    train(made)
    found = load(tmp_path / "run").state_dict()
    assert torch.equal(found["body.0.weight"], weights(tmp_path / "base.pt")["body.0.weight"])
    torch.save(Base().state_dict(), tmp_path / "base.pt")
    with pytest.raises(ConfigError, match=r"transfer.weights: .* but body.0.weight is another one"):
        load(tmp_path / "run")


def test_two_processes_resume_and_one_loads_what_they_saved(tmp_path: Path) -> None:
    for name, weights_of in (("one", None), ("base", 3)):
        torch.manual_seed(weights_of or 0)
        torch.save(Base().state_dict(), tmp_path / f"{name}.pt")
    transfer = {"freeze": ["body.0.*", "body.2.*"], "weights": str(tmp_path / "base.pt")}
    made = config(tmp_path, "two", transfer=transfer, callbacks=UNFREEZE)
    made["distributed"] = {"strategy": "ddp"}
    made["run"]["code_paths"].append(str(Path(__file__).parent.parent))  # what this file imports
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(made))
    run_several(tmp_path, 2, [["two.yaml", "trainer.stop_at=7step"], ["two.yaml"], ["two.yaml", "run.name=whole"]])
    assert rows(tmp_path / "two") == rows(tmp_path / "whole")
    assert same(load(tmp_path / "two"), load(tmp_path / "whole"))
    assert "body.0.weight" in weights(tmp_path / "two" / "model.pt"), "it trains from step 6 on"
    assert torch.equal(load(tmp_path / "two").body[2].weight, weights(tmp_path / "base.pt")["body.2.weight"])
    (tmp_path / "base.pt").write_bytes((tmp_path / "one.pt").read_bytes())
    with pytest.raises(AssertionError, match=r"transfer.weights: .* but body.\d.weight is another one"):
        run_several(tmp_path, 2, [["two.yaml", "trainer.duration=5ep"]])


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_a_live_model_gets_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, again = Base(), Base()
    again.load_state_dict(model.state_dict())
    first = config(tmp_path, "run", model=model)
    train(first)
    train({**first, "model": again})  # it is completed: model.pt is loaded
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
