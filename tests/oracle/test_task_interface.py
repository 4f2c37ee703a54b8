"""Every kind of task equals a loop that a textbook would write, over whole global batches and in double precision.

On one process in micro-batches, on two and on three, with uneven shares; whole, and stopped and resumed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import task_pieces as pieces
import torch
import yaml
from comparing import QUIET, trained
from runs import environment, rows
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import default_collate

from dist_train import train
from dist_train.config.errors import ConfigError
from dist_train.data.plan import Plan, micro_slices
from dist_train.runtime.seeding import seed_everything, seed_forward

STEPS, BATCH = 6, 7
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}


def config_of(optimizer: Any = SGD, outputs: int = 3, **keys: Any) -> dict[str, Any]:
    data = {
        "train": piece("Triples"),
        "val": piece("Triples", samples=10, seed=1),
        "global_batch_size": BATCH,
        "eval_batch_size": 4,
        "drop_last": keys.pop("drop_last", True),
    }
    common = {
        "data": data,
        "model": piece("Net", outputs=outputs),
        "optimizer": optimizer,
        "checkpoint": {"every": "3step"},
    }
    trainer = {"duration": f"{STEPS}step", "log_every": "1step", "micro_batch_size": 2, **keys.pop("trainer", {})}
    return {**common, "trainer": trainer, **keys}


def piece(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"task_pieces.{name}", **arguments}


LBFGS = {"_target_": "torch.optim.LBFGS", "lr": 0.5, "max_iter": 4, "line_search_fn": "strong_wolfe"}
HALVED = {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.5, "every": "2step"}
GAN = {"D": {**SGD, "match": "D.*"}, "G": {"_target_": "torch.optim.Adam", "lr": 0.01}}
JOINT = {"body": {**SGD, "match": "net.0.*"}, "rest": {"_target_": "torch.optim.Adam", "lr": 0.01}}
CONFIGS: dict[str, dict[str, Any]] = {
    "shared": config_of(task=piece("Shared"), metrics=["accuracy"]),
    "elements": config_of(task=piece("Elements")),
    "own": config_of(task=piece("OwnCounts"), outputs=6, trainer={"clip_grad_norm": 0.5}),
    "dict": config_of(loss=piece("two_values"), val_loss={"_target_": "task_pieces.decorrelated"}),
    "whole": config_of(task=piece("Contrast"), outputs=4),
    "whole_short": config_of(task=piece("Contrast"), outputs=4, drop_last=False),
    "covariance": config_of(loss=piece("decorrelated"), trainer={"whole_batch": True}),
    "gan": config_of(GAN, task=piece("Game"), model=piece("Pair"), scheduler={"G": HALVED}),
    "joint": config_of(JOINT, task=piece("Shared"), scheduler={"rest": HALVED}, trainer={"clip_grad_norm": 0.5}),
    "joint_whole": config_of(JOINT, loss=piece("decorrelated"), trainer={"whole_batch": True}),
    "lbfgs": config_of(LBFGS, task=piece("Shared")),
    "sam": config_of({"_target_": "task_pieces.SAM", "lr": 0.1}, task=piece("Shared")),
}  # fmt: skip


# The textbook: each gives the losses of a batch by name, as means, and what is minimized.
def means_shared(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    outputs = net(batch[0])
    entropy, size = functional.cross_entropy(outputs, batch[1][0]), outputs.square().sum(1).mean()
    return {"loss": entropy + 0.1 * size, "loss/entropy": entropy, "loss/size": size}


def means_elements(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    outputs = net(batch[0])
    entropy, size = functional.cross_entropy(outputs, batch[1][0]), outputs.square().mean()
    return {"loss": entropy + 0.1 * size, "loss/entropy": entropy, "loss/size": size}


def means_own(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    outputs, (first, second) = net(batch[0]), batch[1]
    one, other = (
        functional.cross_entropy(outputs[:, :3], first),
        functional.cross_entropy(outputs[:, 3:], second, ignore_index=-1),
    )
    return {"loss": one + 0.5 * other, "loss/first": one, "loss/second": other}


def means_dict(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    parts = {f"loss/{name}": value.mean() for name, value in pieces.two_values(net(batch[0]), batch[1]).items()}
    return {"loss": sum(parts.values(), torch.zeros(())), **parts}


def means_whole(net: Any, batch: Any) -> dict[str, Tensor]:
    return {"loss": net.task.loss(*net.task.outputs(net, batch))}


def means_covariance(net: nn.Module, batch: Any) -> dict[str, Tensor]:
    return {"loss": pieces.decorrelated(net(batch[0]), None)}


MEANS: dict[str, Callable[[Any, Any], dict[str, Tensor]]] = {
    "shared": means_shared, "elements": means_elements, "own": means_own, "dict": means_dict, "whole": means_whole,
    "whole_short": means_whole, "covariance": means_covariance, "joint": means_shared, "joint_whole": means_covariance,
    "lbfgs": means_shared, "sam": means_shared,
}  # fmt: skip


def batches(drop_last: bool = True) -> Iterator[Any]:
    data, plan = pieces.Triples(), Plan(0, 22, BATCH, drop_last=drop_last)
    for step in range(STEPS):
        yield default_collate([data[int(index)] for index in plan.batch(step)])


def plain(name: str) -> tuple[list[dict[str, float]], nn.Module]:
    """The losses of each step, and the model after the last."""
    if name == "gan":
        return plain_gan()
    config, means = CONFIGS[name], MEANS[name]
    seed_everything(0)
    net: Any = pieces.Net(config["model"]["outputs"])
    if name in ("whole", "whole_short"):
        net.task = pieces.Contrast()
    if name.startswith("joint"):
        return plain_joint(net, means, name == "joint")
    spec = dict(config["optimizer"])
    kind = {"torch.optim.SGD": torch.optim.SGD, "torch.optim.LBFGS": torch.optim.LBFGS, "task_pieces.SAM": pieces.SAM}
    optimizer: Any = kind[spec.pop("_target_")](net.parameters(), **spec)
    curve = []
    for batch in batches(config["data"]["drop_last"]):
        found = means(net, batch)
        curve.append({key: float(value.detach()) for key, value in found.items()})

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = means(net, batch)["loss"]
            loss.backward()
            return loss

        closure()
        if name == "own":
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step(closure) if name in ("lbfgs", "sam") else optimizer.step()
    return curve, net


def plain_joint(net: Any, means: Any, clipped: bool) -> tuple[list[dict[str, float]], nn.Module]:
    """Two optimizers step on the gradient of one backward."""
    body = torch.optim.SGD(net.net[0].parameters(), lr=0.1, momentum=0.9)
    rest = torch.optim.Adam(net.net[2].parameters(), lr=0.01)
    schedule, curve = torch.optim.lr_scheduler.ExponentialLR(rest, 0.5), []
    for step, batch in enumerate(batches()):
        found = means(net, batch)
        curve.append({key: float(value.detach()) for key, value in found.items()})
        net.zero_grad()
        found["loss"].backward()
        if clipped:
            curve[-1]["grad_norm"] = float(nn.utils.clip_grad_norm_(net.parameters(), 0.5))
        body.step()
        rest.step()
        if clipped and step % 2:
            schedule.step()
    return curve, net


def plain_gan() -> tuple[list[dict[str, float]], nn.Module]:
    seed_everything(0)
    pair, curve = pieces.Pair(), []
    critic = torch.optim.SGD(pair.D.parameters(), lr=0.1, momentum=0.9)
    generator = torch.optim.Adam(pair.G.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(generator, 0.5)
    for step, (real, _) in enumerate(batches()):
        with torch.no_grad():
            fake = pair.G(real.flip(1))
        parts = {"real": functional.softplus(-pair.D(real)).mean(), "fake": functional.softplus(pair.D(fake)).mean()}
        row = {"loss/D": parts["real"] + parts["fake"], **{f"loss/D/{key}": value for key, value in parts.items()}}
        critic.zero_grad()
        row["loss/D"].backward()
        critic.step()
        if step % 2:
            row["loss/G"] = -pair.D(pair.G(real.flip(1))).mean()
            generator.zero_grad()
            row["loss/G"].backward()
            generator.step()
        curve.append({key: float(value.detach()) for key, value in row.items()})
        if step % 2:
            schedule.step()
    return curve, pair


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them on two processes and on three, by pairwise exchange and by DDP, in one start."""
    folder, jobs = tmp_path_factory.mktemp("tasks"), {2: [], 3: []}  # type: ignore[var-annotated]
    for ranks, of_ranks in jobs.items():
        for name, config in CONFIGS.items():
            run = {"name": f"{name}-{ranks}", "code_paths": [str(Path(__file__).parent)]}
            path = folder / f"{name}-{ranks}.yaml"
            path.write_text(yaml.safe_dump({"run": run, "tracking": QUIET, **config}))
            of_ranks.append([path.name, f"distributed.strategy={'auto' if ranks == 2 else 'ddp'}"])
    command = [sys.executable, str(Path(__file__).with_name("forked_ranks.py")), json.dumps(jobs)]
    done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder / "runs"


def assert_is_the_textbook(name: str, run: Path) -> None:
    curve, net = plain(name)
    found = rows(run, "train")
    assert len(found) == STEPS
    for expected, row in zip(curve, found, strict=True):
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    weights = torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "model.pt", weights_only=True)
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("task.")}
    for key, value in state.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-9, atol=1e-11)
    if name in ("whole", "whole_short"):
        kept = torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "task.pt", weights_only=True)
        torch.testing.assert_close(kept["task.scale"], net.task.scale.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_process_in_micro_batches_is_the_textbook(name: str, tmp_path: Path) -> None:
    assert_is_the_textbook(name, trained(tmp_path, CONFIGS[name]))


@pytest.mark.parametrize("stop", [None, "2step"])
def test_a_row_over_several_steps_is_the_loss_of_all_their_samples(stop: str | None, tmp_path: Path) -> None:
    """Of losses with weights of their own too, as an evaluation has it: each a mean over all that have it, then their sum."""
    config = copy.deepcopy(CONFIGS["own"])
    config["trainer"] |= {"log_every": f"{STEPS}step", "clip_grad_norm": None}
    if stop is not None:
        trained(tmp_path, {**config, "trainer": {**config["trainer"], "stop_at": stop}})
    (row,) = rows(trained(tmp_path, config), "train")
    seed_everything(0)
    net, sums = pieces.Net(6), torch.zeros(2, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), **{key: SGD[key] for key in SGD if key != "_target_"})
    for batch in batches():
        found, has = means_own(net, batch), (batch[1][1] >= 0).sum()
        counts = torch.stack([torch.tensor(len(batch[0])), has])
        sums += torch.stack([torch.stack([found["loss/first"], found["loss/second"]]).detach() * counts, counts], 1)
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    first, second = (sums[:, 0] / sums[:, 1]).tolist()
    expected = {"loss": first + 0.5 * second, "loss/first": first, "loss/second": second}
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_several_processes_are_the_textbook(name: str, ranks: int, on_ranks: Path) -> None:
    assert_is_the_textbook(name, on_ranks / f"{name}-{ranks}")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stopped_run_resumes_bitwise(name: str, tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", CONFIGS[name])
    config = copy.deepcopy(CONFIGS[name])
    for stop in ("1step", "4step", None):
        config["trainer"]["stop_at"] = stop
        stopped = trained(tmp_path / "stopped", config)
    assert rows(whole) == rows(stopped)
    for file in ("model.pt", "optimizer.pt"):
        one, other = (
            torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / file, weights_only=True) for run in (whole, stopped)
        )
        assert str(one) == str(other)


def test_the_second_pass_of_a_whole_batch_repeats_dropout_and_batchnorm(tmp_path: Path) -> None:
    """Against one graph over all micro-batches, each with its own seeds and statistics."""
    config = config_of(task=piece("Contrast"), model=piece("Noisy", outputs=4), trainer={"micro_batch_size": 4})
    run = trained(tmp_path, config)
    seed_everything(0)
    net: Any = pieces.Noisy(4)
    task = pieces.Contrast()
    optimizer = torch.optim.SGD([*net.parameters(), task.scale], lr=0.1, momentum=0.9)
    curve = []
    for step, (inputs, _) in enumerate(batches()):
        parts = []
        for micro in micro_slices(BATCH, 0, 1, 4):
            seed_forward(0, step, micro.start, torch.device("cpu"))
            parts.append(task.outputs(net, (inputs[micro], None))[0])
        loss = task.loss((*(torch.cat(part) for part in zip(*[p[:2] for p in parts], strict=True)), parts[0][2]), None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    assert [row["loss"] for row in rows(run, "train")] == pytest.approx(curve, rel=1e-9)
    found = torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "model.pt", weights_only=True)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)
    assert int(found["net.1.num_batches_tracked"]) == STEPS * 2, "statistics change once a step for each micro-batch"


def test_an_evaluation_has_the_losses_of_the_task(tmp_path: Path) -> None:
    run = trained(tmp_path, CONFIGS["own"])
    net = pieces.Net(6)
    net.load_state_dict(torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "model.pt", weights_only=True))
    data = pieces.Triples(10, 1)
    expected = means_own(net, default_collate([data[index] for index in range(10)]))
    row = rows(run, "val")[-1]
    assert {key: row[key] for key in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-9)


def test_an_evaluation_has_the_factors_of_the_moment(tmp_path: Path) -> None:
    """Losses with weights of their own, of which one is annealed."""
    config = {**copy.deepcopy(CONFIGS["own"]), "task": piece("Annealed")}
    config["trainer"] |= {"evaluate_every": "1step", "log_every": "1step"}
    for split in ("train", "val"):
        found = [(row["loss"], row["loss/first"], row["loss/second"]) for row in rows(trained(tmp_path, config), split)]
        assert len(found) == STEPS
        for step, (loss, first, second) in enumerate(found):
            assert loss == pytest.approx(first + (step // 2 + 1) * second, rel=1e-9)


def test_val_loss_is_another_loss(tmp_path: Path) -> None:
    run = trained(tmp_path, {**CONFIGS["dict"], "data": {**CONFIGS["dict"]["data"], "eval_batch_size": 10}})
    net = pieces.Net()
    net.load_state_dict(torch.load(run / "checkpoints" / f"step-{STEPS:08d}" / "model.pt", weights_only=True))
    expected = float(pieces.decorrelated(net(pieces.Triples(10, 1).inputs), None))
    assert rows(run, "val")[-1]["loss"] == pytest.approx(expected, rel=1e-9)


AVERAGED = {"task": piece("Game"), "model": piece("Pair"), "optimizer": GAN, "trainer": {"ema_decay": {"g": 0.9}}}
CLIPPED = {"task": piece("Shared"), "trainer": {"clip_grad_norm": {"D": 0.9}}}
ORPHANS = {"D": {**SGD, "match": "D.0.*"}, "G": {**SGD, "match": "G.*"}}
REFUSED = {
    "no weights": ({"task": piece("NoWeights")}, "weights of their own"),
    "other names": ({"task": piece("OtherNames")}, "expected the same names"),
    "other losses": ({"task": piece("OtherLosses")}, "give the same ones for each batch"),
    "rows": ({"task": piece("TwoRows")}, "has a row for each sample"),
    "moves": ({"task": piece("NobodyMoves"), "model": piece("Pair"), "optimizer": GAN}, "each once"),
    "orphan": ({"task": piece("Game"), "model": piece("Pair"), "optimizer": ORPHANS}, "no optimizer's `match` fits D.2.weight"),
    "no such optimizer": (AVERAGED, "there is no optimizer g"),
    "one optimizer": (CLIPPED, "expected a number, as there is one optimizer"),
    "two rests": ({"task": piece("Game"), "model": piece("Pair"), "optimizer": {"D": SGD, "G": SGD}}, "both have no `match`"),
    "moves of one loss": ({"task": piece("OneLossMoves"), "optimizer": JOINT}, "has one loss for all"),
    "shared closure": ({"task": piece("Shared"), "optimizer": {**JOINT, "rest": LBFGS}}, "can't share one with other"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_exactly_is_refused(name: str, tmp_path: Path) -> None:
    keys, message = REFUSED[name]
    config = config_of(outputs=6, **keys)
    with pytest.raises((ConfigError, ValueError), match=message):
        train({"run": {"name": "run", "dir": str(tmp_path)}, "tracking": QUIET, **config})


def test_one_of_several_losses_can_decide_which_checkpoint_is_the_best(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["dict"])
    config |= {"val_loss": None, "checkpoint": {"every": "3step", "keep_best": "val/loss/size"}}
    config["trainer"]["evaluate_every"] = "1step"
    run = trained(tmp_path, config)
    values = {row["step"]: row["loss/size"] for row in rows(run, "val")}
    assert json.loads((run / "result.json").read_text())["kept_step"] == min(
        values, key=lambda step: (values[step], step)
    )


def test_clipping_and_the_average_are_of_one_of_several_optimizers(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["gan"])
    config["trainer"] |= {"clip_grad_norm": {"D": 0.1}, "ema_decay": {"G": 0.5}}
    run = trained(tmp_path, config)
    seed_everything(0)
    pair: Any = pieces.Pair()
    critic = torch.optim.SGD(pair.D.parameters(), lr=0.1, momentum=0.9)
    generator = torch.optim.Adam(pair.G.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(generator, 0.5)
    average = {name: p.detach().clone() for name, p in pair.G.named_parameters()}
    for step, (real, _) in enumerate(batches()):
        fake = pair.G(real.flip(1)).detach()
        critic.zero_grad()
        (functional.softplus(-pair.D(real)).mean() + functional.softplus(pair.D(fake)).mean()).backward()
        nn.utils.clip_grad_norm_(pair.D.parameters(), 0.1)
        critic.step()
        if step % 2:
            generator.zero_grad()
            (-pair.D(pair.G(real.flip(1))).mean()).backward()
            generator.step()
            schedule.step()
        for name, p in pair.G.named_parameters():
            average[name].lerp_(p.detach(), 0.5)
    found = torch.load(run / "model.pt", weights_only=True)
    for name, p in pair.D.named_parameters():
        torch.testing.assert_close(found[f"D.{name}"], p.detach(), rtol=1e-9, atol=1e-11)
    for name, value in average.items():
        torch.testing.assert_close(found[f"G.{name}"], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("first", "second"), [("shared", "gan"), ("gan", "shared")])
def test_a_run_with_other_optimizers_is_not_resumed(first: str, second: str, tmp_path: Path) -> None:
    one, other = copy.deepcopy(CONFIGS["gan"]), copy.deepcopy(CONFIGS["gan"])
    alone = one if first == "shared" else other
    alone |= {"optimizer": SGD, "scheduler": None, "task": piece("Alone")}
    one["trainer"]["stop_at"] = "2step"
    trained(tmp_path, one)
    other["checkpoint"] = {"every": "3step", "accept_changes": True}
    with pytest.raises(ConfigError, match="this run was started with"):
        trained(tmp_path, other)


def test_several_optimizers_resume_in_another_order_of_the_config(tmp_path: Path) -> None:
    whole, config = trained(tmp_path / "whole", CONFIGS["gan"]), copy.deepcopy(CONFIGS["gan"])
    config["trainer"]["stop_at"] = "2step"
    trained(tmp_path / "stopped", config)
    config["trainer"]["stop_at"] = None
    config["optimizer"] = dict(reversed(config["optimizer"].items()))
    stopped = trained(tmp_path / "stopped", config)
    assert rows(whole, "train") == rows(stopped, "train"), "the task's moves has the order"


def test_without_moves_the_order_of_the_config_is_that_of_the_run(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["gan"]) | {"task": piece("AllMove"), "scheduler": None}
    config["trainer"]["stop_at"] = "2step"
    trained(tmp_path, config)
    config["optimizer"] = dict(reversed(config["optimizer"].items()))
    config["trainer"]["stop_at"] = None
    with pytest.raises(ConfigError, match="which was D, G when this run was started and is G, D"):
        trained(tmp_path, config)


def test_a_closure_sees_weights_that_change_behind_autograds_back(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["sam"])
    config["optimizer"]["_target_"] = "task_pieces.SAMByData"
    one, other = trained(tmp_path / "data", config), trained(tmp_path / "plain", CONFIGS["sam"])
    assert [row["loss"] for row in rows(one, "train")] == [row["loss"] for row in rows(other, "train")]
