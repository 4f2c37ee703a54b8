"""Users of timm, transformers, peft, segmentation_models_pytorch, torchvision, webdataset and datasets, each a config here.

Their models are small and have random weights, their data is made here: nothing is downloaded. Each trains six steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from runs import rows, run_several

from dist_train import load, train
from dist_train.commands import evaluate
from dist_train.config.errors import ConfigError

HERE = Path(__file__).parent
USERS = sorted(path.stem for path in HERE.glob("*.yaml") if path.stem != "base")
STREAMS = ("hf_parts", "hf_stream", "self_split", "web")
EVALUATED = [user for user in USERS if user not in STREAMS]
PLAIN = [user for user in USERS if user != "hf_parts"]  # where there is a plain loop
# What draws nothing in its forward and has no statistics of a batch trains the same with shares of 3, 3 and 2 samples.
STILL = {"gpt2": ["model.dropout=0"], "simclr": [], "web": []}


@pytest.fixture(scope="module")
def users() -> ModuleType:
    """zoo_users, imported here: else every process of pytest-xdist would import their packages, to collect."""
    return pytest.importorskip("zoo_users", reason="needs pip install -e '.[zoo]'")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folder(users: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all runs, with webdataset's tar files."""
    home = tmp_path_factory.mktemp("zoo")
    users.write_tars(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str, str], Path]:
    """A user's run on one process: whole, or stopped after four steps and begun again, or whole without dropout."""

    @cache
    def run(user: str, history: str) -> Path:
        for job in jobs(user, history, f"{user}-{history}"):
            train(*job)
        return folder / "runs" / f"{user}-{history}"

    return run


@pytest.fixture(scope="module")
def pair(folder: Path) -> Callable[[str, str], Path]:
    """The same on two processes, which are started once for all."""
    run_several(
        folder, 2, [job for user in USERS for h in ("whole", "stopped") for job in jobs(user, h, f"{user}-{h}-2")]
    )
    return lambda user, history: folder / "runs" / f"{user}-{history}-2"


@pytest.fixture(scope="module")
def three(folder: Path) -> Callable[[str], Path]:
    """Runs without dropout on three processes, which are started once for all."""
    run_several(folder, 3, [job for user in STILL for job in jobs(user, "still", f"{user}-still-3")])
    return lambda user: folder / "runs" / f"{user}-still-3"


def jobs(user: str, history: str, name: str) -> list[list[str]]:
    """The starts of a run as [config, override, ...]."""
    job = [str(HERE / f"{user}.yaml"), f"run.name={name}"]
    if history == "still":
        return [[*job, *STILL[user]]]
    return [[*job, "trainer.stop_at=4step"], job] if history == "stopped" else [job]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint: what training made, before any average."""
    return torch.load(max((run / "checkpoints").iterdir()) / "model.pt", weights_only=True)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run, "train")]


@pytest.mark.parametrize("user", PLAIN)
def test_one_process_trains_as_the_plain_loop_does(
    user: str, alone: Callable[[str, str], Path], users: ModuleType
) -> None:
    assert sorted(users.PLAIN) == PLAIN
    run = alone(user, "whole")
    model, expected = users.PLAIN[user]()
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    found, state = last_weights(run), model.state_dict()
    if user == "simclr":  # its plain loop takes the whole batch in one forward: equal up to rounding
        torch.testing.assert_close(found, state)
        return
    if user == "lora":  # only adapters are saved
        state = {name: state[name] for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == state.keys()
    assert [name for name, value in state.items() if not torch.equal(value, found[name])] == []


@pytest.mark.parametrize("user", USERS)
def test_two_processes_give_the_same_curve(user: str, alone: Callable[..., Path], pair: Callable[..., Path]) -> None:
    one, two = losses(alone(user, "whole")), losses(pair(user, "whole"))
    if user == "hf_parts":
        assert one != two
        one, two = ([sum(curve[:3]), sum(curve[3:])] for curve in (one, two))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("user", STILL)
def test_three_processes_give_the_same_curve(user: str, alone: Callable[..., Path], three: Callable[..., Path]) -> None:
    one, several = losses(alone(user, "still" if STILL[user] else "whole")), losses(three(user))
    assert several == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("world", ["alone", "pair"])
@pytest.mark.parametrize("user", USERS)
def test_a_stopped_run_ends_with_the_weights_of_a_whole_one(
    user: str, world: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(world)
    whole, stopped = last_weights(run(user, "whole")), last_weights(run(user, "stopped"))
    assert whole.keys() == stopped.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, stopped[name])] == []
    assert rows(run(user, "whole")) == rows(run(user, "stopped"))


@pytest.mark.parametrize("user", [user for user in EVALUATED if user not in ("gpt2", "lora")])
def test_what_a_run_leaves_is_loaded_by_its_own_library_or_plain_torch(
    user: str, pair: Callable[..., Path], users: ModuleType, tmp_path: Path
) -> None:
    """By timm's `checkpoint_path`, `from_pretrained`, `load_state_dict`; for the others see test_after_training.py."""
    run = pair(user, "whole")
    ours = load(run)
    if user in users.PRETRAINED:
        ours.save_pretrained(tmp_path)
        theirs = users.PRETRAINED[user](tmp_path)
    else:
        theirs = users.READ[user](run / "model.pt")
    assert type(theirs) is type(ours)
    expected = ours.state_dict()
    found = theirs.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


@pytest.mark.parametrize(
    ("user", "overrides", "message"),
    [
        (
            "gan",
            ["optimizer=[{_target_: torch.optim.Adam}, {_target_: torch.optim.Adam}]"],
            "several are written by name",
        ),
        (
            "gpt2",
            ["task._target_=zoo_language.Naive"],
            r"a task's step must return \(loss summed over the batch, weight\)",
        ),
        (
            "nano",
            ["task=null", "loss={_target_: torch.nn.CrossEntropyLoss}"],
            "expects the model's outputs as one tensor, but found a tuple",
        ),
        ("simclr", ["trainer.whole_batch=false"], "set trainer.whole_batch=true"),
        ("timm_vit", ["scheduler={_target_: timm.scheduler.CosineLRScheduler, t_initial: 5}"], "a scheduler of torch"),
    ],
)
def test_what_is_not_supported_is_named(user: str, overrides: list[str], message: str, folder: Path) -> None:
    with pytest.raises((ConfigError, TypeError, ValueError), match=message):
        train(*jobs(user, "whole", "refused")[0], "checkpoint.resume=auto", *overrides)
    assert not (folder / "runs/refused/model.pt").exists()


@pytest.mark.parametrize("user", EVALUATED)
def test_evaluate_gives_the_recorded_metrics(
    user: str, pair: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint that two processes made, on one."""
    run = pair(user, "whole")
    assert evaluate.main(["--run", str(run), "--split", "val"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    recorded = rows(run, "val")[-1]
    assert told == pytest.approx({name: recorded[name] for name in told}, rel=1e-6)
    assert told["eval_samples"] == 10
