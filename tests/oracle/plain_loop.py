"""The independent loop: a whole run in plain PyTorch, from its first step to the weights that are kept.

It is compared with `train()` bit for bit. The step is in plain_step.py, what a config's components are in described.py.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from plain_step import PlainStep
from torch import Tensor


def finite(figure: float | None) -> float | None:
    """As the records have it: JSON knows neither inf nor nan."""
    return None if figure is None or figure - figure != 0 else figure


def direction(metric: str) -> str:
    """Which way is better, by the metric's name."""
    return "min" if any(word in metric for word in ("loss", "mae")) else "max"


class PlainLoop(PlainStep):
    """`run()`, then look at `rows`, `saved` (by step), `result` and `model_file`."""

    def __init__(self, config: dict[str, Any], ranks: int = 1):
        super().__init__(config, ranks)
        self.rows: list[dict[str, Any]] = []
        self.extra: dict[str, float] = {}
        self.log = self.extra.__setitem__  # for callbacks
        self.saved: dict[int, dict[str, Any]] = {}
        self.best: tuple[tuple[float, float], int] | None = None
        self.waited: tuple[float, int] | None = None
        self.metrics: dict[str, float] = {}
        chosen = self.saving["keep_best"] if "val" in self.sets else None
        if chosen == "auto":
            chosen = f"val/{([*config.get('metrics', []), 'loss'])[0]}"
        said, _, name = (chosen or "").rpartition(" ")
        self.keep_best = (name, said or direction(name)) if chosen else None

    @property
    def epoch(self) -> int:
        return 0 if self.step == 0 else self.plan.epoch_of(self.step - 1) + 1

    def run(self) -> PlainLoop:
        options, outcome = self.options, None
        every = self.saving["every"] if isinstance(self.saving["every"], list) else [self.saving["every"]]
        if options["evaluate_at_start"]:
            self.evaluate_val()
        while outcome is None:
            self.train_step(self.step)
            self.samples += self.plan.batch_samples(self.step)
            self.step += 1
            self.after_update()
            for callback in self.callbacks:
                callback.on_step_end(self)
                if self.step % self.epoch_steps == 0:
                    callback.on_epoch_end(self)
            over, improved = self.step >= self.last_step, False
            if over or self.step % self.steps(options["log_every"]) == 0:
                self.row("train", self.train_figures())
            if "val" in self.sets and (over or self.step % self.steps(options["evaluate_every"]) == 0):
                figures = self.evaluate_val()
                over = self.stops(figures) or over
                improved = self.improves(figures)
            stopped = not over and self.step >= self.steps(options["stop_at"])
            outcome = "completed" if over else "preempted" if stopped else None
            if outcome or improved or any(self.step % self.steps(length) == 0 for length in every):
                self.save()
        self.finish(outcome)
        return self

    # Records.

    def row(self, split: str, figures: dict[str, float]) -> None:
        stand = {"step": self.step, "epoch": self.epoch, "samples": self.samples, "split": split}
        self.rows.append({**stand, **{k: finite(v) for k, v in figures.items()}})

    def train_figures(self) -> dict[str, float]:
        loss, weight = self.open
        figures = {"loss": loss / weight if weight else None, "lr": self.lr, "grad_norm": float(self.norm)}
        figures |= ({"skipped": self.skipped} if self.skipped else {}) | self.extra
        self.open = [0.0, 0.0]
        self.extra.clear()
        return figures

    # Evaluation.

    def evaluate_val(self) -> dict[str, float]:
        figures = self.evaluate(self.sets["val"])
        self.row("val", figures)
        self.metrics = figures
        if self.schedule is not None and self.plateau:
            self.schedule.step(figures[(self.schedule_metric or self.keep_best[0]).removeprefix("val/")])
        return figures

    def evaluate(self, dataset: Any) -> dict[str, float]:
        """With an EMA its figures, then those of the raw weights."""
        if self.ema is None:
            return self.measure(dataset)
        raw = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.load_state_dict(self.ema, strict=False)
        figures = self.measure(dataset)
        self.model.load_state_dict(raw, strict=False)
        samples = figures.pop("eval_samples")
        own = self.measure(dataset)
        return figures | {f"raw_{n}": v for n, v in own.items() if n != "eval_samples"} | {"eval_samples": samples}

    @torch.no_grad()
    def measure(self, dataset: Any) -> dict[str, float]:
        """Sums over the cuts of the dataset, in its order, in double precision; one division each at the end."""
        names, size = self.config.get("metrics", []), self.data["eval_batch_size"]
        total = torch.zeros(2 + 2 * len(names), dtype=torch.float64)
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        for start in range(0, len(dataset), size):
            batch = self.read(dataset, range(start, min(len(dataset), start + size)), -1)
            loss, weight, outputs, targets = self.forward(batch)
            sums = [loss, weight, *(x for name in names for x in self.metric(name, outputs.float(), targets))]
            total += torch.tensor([float(x) for x in sums], dtype=torch.float64)
        for module, mode in modes:
            module.training = mode
        figures = {n: float(total[2 * k] / total[2 * k + 1]) for k, n in enumerate(["loss", *names])}
        return {**figures, "eval_samples": len(dataset)}

    def metric(self, name: str, outputs: Tensor, targets: Tensor) -> tuple[Any, Any]:
        if name == "mae":
            return (outputs.double() - targets.double().view_as(outputs)).abs().sum(), outputs.numel()
        if name == "binary_accuracy":  # of logits
            return ((outputs.view(-1) > 0) == (targets > 0.5)).sum(), len(outputs)
        kept = targets != -100
        return (outputs.argmax(1) == targets)[kept].sum(), kept.sum()

    # The end, the best, and what is saved.

    def stops(self, figures: dict[str, float]) -> bool:
        rule = self.options["stop_when"]
        if rule is None:
            return False
        value = figures[rule["metric"].removeprefix("val/")]
        if value > rule.get("above", float("inf")) or value < rule.get("below", -float("inf")):
            return True
        lower = rule.get("mode", direction(rule["metric"])) == "min"
        sign, delta = (-1 if lower else 1), rule.get("min_delta", 0.0)
        if self.waited is None or sign * (value - self.waited[0]) > delta:
            self.waited = value, self.step
        return self.step - self.waited[1] >= self.steps(rule.get("patience"))

    def improves(self, figures: dict[str, float]) -> bool:
        if self.keep_best is None:
            return False
        value, lower = figures[self.keep_best[0].removeprefix("val/")], self.keep_best[1] == "min"
        now = (value if lower else -value, figures["loss"])  # of equal ones that with the least loss
        better = value == value and (self.best is None or now < self.best[0])
        if better:
            self.best = now, self.step
        return better

    def save(self) -> None:
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        ema = {name: value.clone() for name, value in self.ema.items()} if self.ema is not None else {}
        scale = self.scaler.state_dict() if self.scaler is not None else {}
        state = {"model": weights, "optimizer": copy.deepcopy(self.optimizer.state_dict()), "ema": ema, "scaler": scale}
        place = {"step": self.step, "epoch": self.epoch, "samples": self.samples}
        self.saved[self.step] = {**state, "metrics": self.metrics, "place": place}
        newest = sorted(self.saved)[-self.saving["keep_last"] :]
        best = self.best[1] if self.best else -1
        self.saved = {step: held for step, held in self.saved.items() if step in newest or step == best}

    def finish(self, outcome: str) -> None:
        self.result: dict[str, Any] = {"state": outcome, "step": self.step, "epoch": self.epoch}
        self.model_file = {}
        if outcome == "preempted":
            return
        best = self.keep_best is not None and self.best is not None
        kept = self.best[1] if best else self.step
        digest, held = self.digest(), self.saved[kept]
        self.model.load_state_dict(held["model"])
        self.ema = held["ema"] if self.ema is not None else None
        metrics = {"val": held["metrics"]} if "val" in self.sets else {}
        if "test" in self.sets:
            metrics["test"] = self.evaluate(self.sets["test"])
            self.row("test", metrics["test"])
            self.rows[-1] |= held["place"]  # of the weights that were measured
        self.model_file = {**held["model"], **held["ema"]}
        self.result |= {
            "samples": self.samples, "kept": "best" if best else "last", "kept_step": kept, "ema": self.ema is not None,
            "metrics": metrics, "weights_sha256": digest, "world_size": self.ranks,
        }  # fmt: skip

    def digest(self) -> str:
        """Of the raw weights: key, dtype, shape and bytes of each tensor, keys sorted."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()
