"""`train()` equals a plain PyTorch loop by the bit, in everything that it leaves behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle_configs import CONFIGS
from plain_loop import PlainLoop
from runs import result, rows

from dist_train import train

QUIET = {"tensorboard": False, "report": False}


def trained(folder: Path, config: dict[str, Any], **sections: Any) -> Path:
    """A finished run in `folder`."""
    whole = {**copy.deepcopy(config), "run": {"name": "run", "dir": str(folder)}, "tracking": QUIET, **sections}
    whole["trainer"] = {**whole["trainer"]}
    train(whole)
    return folder / "run"


def differences(plain: PlainLoop, run: Path) -> list[str]:
    """Everything in which a run isn't the plain loop, by name; nothing is rounded."""
    found = different("rows", plain.rows, rows(run))
    steps = {int(path.name.removeprefix("step-")): path for path in (run / "checkpoints").iterdir()}
    found += different("checkpoints", sorted(plain.saved), sorted(steps))
    for step in plain.saved.keys() & steps.keys():
        parts = {path.stem: torch.load(path, weights_only=True) for path in steps[step].glob("*.pt")}
        parts["scaler"] = parts.pop("trainer")["stepper"]["scaler"]
        for name in ("model", "optimizer", "ema", "scaler"):
            found += different(f"step {step}: {name}", plain.saved[step][name], parts.get(name, {}))
    if plain.result["state"] == "completed":
        told = result(run)
        del told["reason"]
        found += different("result", plain.result, told)
        found += different("model.pt", plain.model_file, torch.load(run / "model.pt", weights_only=True))
    return found


def different(name: str, one: Any, other: Any) -> list[str]:
    """The places at which two trees differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    if isinstance(one, dict) and isinstance(other, dict) and list(map(str, one)) != [] and one.keys() == other.keys():
        return [place for key in one for place in different(f"{name}.{key}", one[key], other[key])]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [place for k, pair in enumerate(zip(one, other)) for place in different(f"{name}.{k}", *pair)]
    return [] if one == other and type(one) is type(other) else [f"{name}: {one!r} is not {other!r}"[:300]]


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_the_plain_loop(name: str, tmp_path: Path) -> None:
    run = trained(tmp_path, CONFIGS[name])
    assert differences(PlainLoop(CONFIGS[name]).run(), run) == []
