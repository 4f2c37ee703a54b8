"""Whatever a forward leaves behind is part of the run: it trains, it is saved, and evaluations and saves don't touch it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import result, rows, run_several, same_state_dicts
from torch import nn
from torch.nn import functional

import dist_train
from dist_train.commands import doctor
from dist_train.config.errors import ConfigError
from dist_train.data.plan import Plan
from dist_train.objective.modules import Modules
from dist_train.run.api import train
from dist_train.run.open import open_run
from dist_train.runtime.seeding import seed_everything, seed_forward
from dist_train.training.state import of_every_rank

KEPT = Path(__file__).parent / "programs" / "kept.py"
CONFIG = """
data: {train: {_target_: kept.Data}, val: {_target_: kept.Data, seed: 1}, global_batch_size: 8, num_workers: 0,
       eval_batch_size: 9}
model: {_target_: kept.Drift}
loss: {_target_: kept.Arc}
metrics: [accuracy]
optimizer: {_target_: torch.optim.SGD, lr: 0.1, momentum: 0.9}
trainer: {duration: 3ep, log_every: 1step, evaluate_every: 1ep}
checkpoint: {every: 1ep}
tracking: {tensorboard: false, report: false}
"""
PLAIN = "loss={_target_: torch.nn.CrossEntropyLoss}"
THAW = [
    PLAIN,
    "transfer.freeze=[body.*]",
    "trainer.ema_decay=0.9",
]
OURS = "callbacks=[{_target_: dist_train.callbacks.Unfreeze, match: body, after: 1ep}]"
KINDS = {
    "loss": ["trainer.ema_decay=0.9"],
    "task": ["loss=null", "task={_target_: kept.Teaches}"],
    "thaw": [*THAW, "callbacks=[{_target_: kept.Thaw}]"],
    "ours": [*THAW, OURS],
    "added": [
        *THAW,
        "callbacks=[{_target_: kept.Thaw, add: true}]",
        "scheduler={_target_: torch.optim.lr_scheduler.CosineAnnealingLR, T_max: 20, every: 1step}",
    ],
    "foreign": [PLAIN, "model._target_=kept.Foreign", "optimizer={_target_: kept.Slowing, lr: 0.1}"],
    "ddp-foreign": [
        PLAIN,
        "model._target_=kept.Foreign",
        "optimizer={_target_: kept.Slowing, lr: 0.1}",
        "distributed.strategy=ddp",
    ],
    "ddp": [*THAW, OURS, "distributed.strategy=ddp", "distributed.bucket_mb=0.0001"],
    "ddp-task": ["loss=null", "task={_target_: kept.Teaches}", "distributed.strategy=ddp"],
}
ON = {
    1: ("loss", "task", "thaw", "ours", "added", "foreign"),
    2: ("loss", "added", "ddp-task", "ddp-foreign"),
    3: ("loss", "task", "thaw", "ddp"),
}
RARE = ["trainer.evaluate_every=3ep", "checkpoint.every=[3ep]", "checkpoint.keep_best=null"]
OFTEN = ["trainer.evaluate_every=1step", "checkpoint.every=[1step]", "checkpoint.keep_best=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "c.yaml").write_text(CONFIG)
    shutil.copy(KEPT, folder)
    return folder


def jobs(processes: int) -> list[list[str]]:
    """Each kind: whole, stopped (at the moment of unfreezing, for one) and continued, and without saves and evaluations."""
    found = []
    for name in ON[processes]:
        start = ["c.yaml", *KINDS[name], f"run.dir=runs{processes}"]
        stop = 5 if name == "thaw" else 7
        found.append([*start, f"run.name={name}-whole"])
        found += [[*start, f"run.name={name}-stopped", *more] for more in ([f"trainer.stop_at={stop}step"], [])]
        if name in ("loss", "ddp-task"):
            found += [[*start, f"run.name={name}-{how}", *more] for how, more in (("rare", RARE), ("often", OFTEN))]
    return found


def assert_same_ends(folder: Path, processes: int) -> None:
    """All of a kind end alike."""
    runs = folder / f"runs{processes}"
    for name in ON[processes]:
        whole, stopped = runs / f"{name}-whole", runs / f"{name}-stopped"
        assert result(whole) == result(stopped), name
        assert rows(whole) == rows(stopped), name
        files = ["model.pt", "task.pt"] if "task" in name or name == "loss" else ["model.pt"]
        assert (whole / "task.pt").exists() == (len(files) == 2)
        for file in files:
            assert same_state_dicts(whole / file, stopped / file), (name, file)
    for name in {"loss", "ddp-task"} & set(ON[processes]):
        rare, often = (result(runs / f"{name}-{how}")["weights_sha256"] for how in ("rare", "often"))
        assert rare == often, f"{name}: saving or evaluating has changed the training"


def test_a_stopped_run_ends_as_the_one_that_never_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for job in jobs(1):
        train(*job)
    assert_same_ends(folder, 1)


@pytest.mark.parametrize("processes", [2, 3])
def test_so_it_does_where_ranks_have_buffers_of_their_own(
    folder: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_several(folder, processes, jobs(processes))
    assert_same_ends(folder, processes)
    whole = folder / f"runs{processes}" / "loss-whole"
    monkeypatch.syspath_prepend(str(folder))
    assert one_process_evaluates(whole) == {row["step"]: row["loss"] for row in rows(whole, "val")}
    ranks = saved(folder / f"runs{processes}" / "loss-whole", "ranks")
    assert len(ranks) == processes
    assert {"mean", "replaced", "late", "plain", "loss.centre"} <= set(ranks[1]), "each rank has seen other samples"
    assert set(ranks[0]) == {"hidden", "late", "plain", "count", "heat"}, "what isn't in model.pt and has changed"


def one_process_evaluates(run: Path) -> dict[int, float]:
    """The loss on val of each checkpoint, by its step; whatever trained it."""
    losses = {}
    for path in sorted((run / "checkpoints").glob("step-*")):
        with open_run(str(run), f"step-{int(path.name[5:])}") as restored:
            losses[restored.found.step] = restored.evaluator.run(restored.loader("val"))["loss"]
    return losses


def saved(run: Path, part: str) -> Any:
    """A file of the newest checkpoint."""
    return torch.load(sorted((run / "checkpoints").glob("step-*"))[-1] / f"{part}.pt", weights_only=True)


def plain(steps: int, thaw_at: int | None, lr: float) -> dict[str, torch.Tensor]:
    """A loop as one writes it, for a model and a loss that both train; or for one whose body trains from a step on."""
    import kept

    data, plan = kept.Data(), Plan(0, 40, 8)
    seed_everything(0)
    net, arc = kept.Frozen(), None
    net.body.requires_grad_(False)
    if thaw_at is None:
        seed_everything(0)
        arc = kept.Arc()
    parameters = [*net.head.parameters(), *(arc.parameters() if arc else ())]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for step in range(steps):
        if step == thaw_at:
            net.body.requires_grad_(True)
            optimizer.add_param_group({"params": list(net.body.parameters())})
        index = plan.batch(step).copy()
        loss = (
            arc(net(data.x[index]), data.y[index]).mean()
            if arc
            else functional.cross_entropy(net(data.x[index]), data.y[index])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {**net.state_dict(), **({f"loss.{k}": v for k, v in arc.state_dict().items()} if arc else {})}


@pytest.mark.parametrize("thaw_at", [None, 5])
def test_a_plain_loop_gives_the_same(folder: Path, thaw_at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body is in eval mode, as its author left it, before and after evaluations; its BatchNorm and dropout do nothing."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    name = f"plain{thaw_at}"
    options = [PLAIN, OURS] if thaw_at else []
    train(
        "c.yaml",
        "model._target_=kept.Frozen",
        "optimizer.momentum=0",
        f"run.name={name}",
        "checkpoint.keep_best=null",
        *options,
    )
    got = torch.load(f"runs/{name}/model.pt", weights_only=True)
    if thaw_at is None:
        got |= torch.load(f"runs/{name}/task.pt", weights_only=True)
    wanted = plain(15, thaw_at, 0.1)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6, msg=key)
    assert int(got["body.1.num_batches_tracked"]) == 0
    moved = not torch.equal(got["body.0.weight"], plain(0, None, 0.1)["body.0.weight"])
    assert moved == bool(thaw_at)


def test_what_other_peoples_models_do_is_what_they_do_in_a_plain_loop(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train()` is called before the first step, a weight that is computed only by the model; see kept.Foreign."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    import kept

    train("c.yaml", *KINDS["foreign"], "run.name=alone", "checkpoint.keep_best=null")
    seed_everything(0)
    data, plan, net = kept.Data(), Plan(0, 40, 8), kept.Foreign()
    optimizer = kept.Slowing(net.train().parameters(), lr=0.1)
    for step in range(15):
        index = plan.batch(step).copy()
        optimizer.zero_grad()
        functional.cross_entropy(net(data.x[index]), data.y[index]).backward()
        seed_forward(0, step, 8, torch.device("cpu"))  # for the optimizer's draws: as of a sample behind the last
        optimizer.step()
    got = torch.load("runs/alone/model.pt", weights_only=True)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert int(got["norm.num_batches_tracked"]) == 0


def test_weights_that_are_not_the_runs_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    model = "model={_target_: kept.Growing, in_features: 6, out_features: 2}"
    with pytest.raises(ValueError, match=r"late: made in the middle of a run .* Make every parameter in __init__"):
        train("c.yaml", PLAIN, model, "run.name=growing")
    assert not list(Path("runs/growing/checkpoints").glob("step-*"))
    world: Any = SimpleNamespace(size=2, rank=1, broadcast=lambda mine: (mine[0], {**mine[1], "weight": 9.0}))
    with pytest.raises(ValueError, match=r"the norm of weight is \S+ on rank 1 and 9 on rank 0"):
        of_every_rank(Modules(nn.Linear(2, 2)), world)


def test_evaluate_and_load_know_all_that_was_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    train("c.yaml", "run.name=seen", "checkpoint.keep_best=null")
    with open_run("runs/seen", "last") as restored:
        metrics = restored.evaluator.run(restored.loader("val"))
        assert not any(module.training for module in restored.evaluator.modules.modules())
    assert metrics["loss"] == result(Path("runs/seen"))["metrics"]["val"]["loss"]
    model = dist_train.load("runs/seen")
    assert (model.count, float(model.hidden) > 0, model.late is not None) == (15, True, True)


def test_a_changed_loss_takes_the_configs_constants_and_the_runs_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for weight, more in ([1.0, ["trainer.stop_at=5step"]], [3.0, ["checkpoint.accept_changes=true"]]):
        loss = f"loss={{_target_: kept.Weighted, weight: {weight}}}"
        train("c.yaml", loss, "run.name=consent", "checkpoint.keep_best=null", *more)
    state = torch.load("runs/consent/task.pt", weights_only=True)
    assert float(state["loss.weight"]) == 3.0
    assert int(state["loss.calls"]) == 15


def test_an_optimizer_with_eval_and_train_is_evaluated_as_it_wants_and_resumes_exactly(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    import kept

    start = ["c.yaml", PLAIN, "optimizer={_target_: kept.Averaging, lr: 0.1}"]
    start += ["model={_target_: torch.nn.Linear, in_features: 6, out_features: 2}"]
    for name, more in {"rare": RARE, "often": OFTEN}.items():
        train(*start, f"run.name=own-{name}", *more)
    train(*start, "run.name=own-stopped", "trainer.stop_at=7step", *OFTEN)
    train(*start, "run.name=own-stopped", *OFTEN)
    often, rare, stopped = (result(Path(f"runs/own-{name}")) for name in ("often", "rare", "stopped"))
    assert often["weights_sha256"] == rare["weights_sha256"] == stopped["weights_sha256"]
    assert often["metrics"] == rare["metrics"] == stopped["metrics"]
    seed_everything(0)
    net, data, plan = nn.Linear(6, 2), kept.Data(), Plan(0, 40, 8)
    optimizer = kept.Averaging(net.parameters(), lr=0.1)
    optimizer.train()
    for step in range(15):
        index = plan.batch(step).copy()
        optimizer.zero_grad()
        functional.cross_entropy(net(data.x[index]), data.y[index]).backward()
        optimizer.step()
    raw = net.weight.detach().clone()
    optimizer.eval()
    got = torch.load("runs/own-often/model.pt", weights_only=True)["weight"]
    torch.testing.assert_close(got, net.weight.detach())
    assert not torch.allclose(got, raw, rtol=1e-3)
    torch.testing.assert_close(dist_train.load("runs/own-often").weight.detach(), got, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="averages the weights itself"):
        train(*start, "run.name=bad", "trainer.ema_decay=0.9")


@pytest.mark.parametrize("model", ["Hidden", "Drift"])
def test_doctor_names_what_no_checkpoint_holds(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert doctor.main(["--config", "c.yaml", f"model._target_=kept.{model}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ("no checkpoint holds, so that a resumed run differs from one that never stopped: seen" in printed) == (
        model == "Hidden"
    )
    assert "three steps, evaluation, save, resume" in printed


def test_a_mistake_in_a_callback_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="nobdy matches no parameter"):
        train("c.yaml", "run.name=bad", OURS.replace("body", "nobdy"))
    with pytest.raises(ConfigError, match="expected epochs or steps"):
        train("c.yaml", "run.name=bad", OURS.replace("1ep", "1min"))
