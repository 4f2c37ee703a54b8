"""Comparing what a run left behind with what the plain loop says; by the bit, unless a tolerance is given."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from runs import result, rows

from dist_train import train

QUIET = {"tensorboard": False, "report": False}
STATUS = ("state", "step", "epoch")


def trained(folder: Path, config: dict[str, Any]) -> Path:
    """The directory of a run of this config, trained in this process."""
    train({"run": {"name": "run", "dir": str(folder)}, "tracking": QUIET, **copy.deepcopy(config)})
    return folder / "run"


def differences(plain: SimpleNamespace, run: Path, tolerance: float = 0.0) -> list[str]:
    """Everything in which a run isn't the plain loop, by name: records, result, model.pt and every checkpoint."""
    found = different("rows", [as_json(row) for row in plain.rows], rows(run), tolerance)
    steps = {int(path.name.removeprefix("step-")): path for path in (run / "checkpoints").iterdir()}
    found += different("checkpoints", sorted(plain.saved), sorted(steps), tolerance)
    for step in plain.saved.keys() & steps.keys():
        parts = {path.stem: torch.load(path, weights_only=True) for path in steps[step].glob("*.pt")}
        parts["scaler"] = parts.pop("trainer")["stepper"]["scaler"]
        for name in ("model", "optimizer", "ema", "scaler"):
            found += different(f"step {step}: {name}", plain.saved[step][name], parts.get(name, {}), tolerance)
    told = json.loads((run / "status.json").read_text())
    found += different("status", {k: plain.result[k] for k in STATUS}, {k: told[k] for k in STATUS})
    if plain.result["state"] == told["state"] == "completed":
        told = result(run)
        del told["reason"]
        digest = told["weights_sha256"] if tolerance else weights_sha256(plain.saved[max(plain.saved)]["model"])
        ours = {**plain.result, "weights_sha256": digest}
        found += different("result", ours, told, tolerance)
        model_file = torch.load(run / "model.pt", weights_only=True)
        found += different("model.pt", plain.model_file, model_file, tolerance)
    return found


def as_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row as the records have it: JSON knows neither inf nor nan."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """Of key, dtype, shape and bytes of each tensor, keys sorted."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def different(name: str, one: Any, other: Any, tolerance: float = 0.0) -> list[str]:
    """The places at which two trees differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{name}: {list(one)} are not {list(other)}"]
        return [place for key in one for place in different(f"{name}.{key}", one[key], other[key], tolerance)]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for k, pair in pairs for place in different(f"{name}.{k}", *pair, tolerance)]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        if not same and tolerance and one.is_floating_point():
            same = torch.allclose(one, other, rtol=tolerance, atol=tolerance)
    else:
        same = one == other and type(one) is type(other)
        if not same and isinstance(one, float) and isinstance(other, float):
            same = abs(one - other) <= tolerance * max(1.0, abs(one))
    return [] if same else [f"{name}: {one!r} is not {other!r}"[:200]]
