"""`compare`: equal runs are, and what was made to differ is found at its step, by its name, on its rank."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from runs import CONFIGS, environment, made_once, run, run_several

from dist_train import train
from dist_train.config.errors import ConfigError
from dist_train.main import main
from dist_train.runtime.storage import open_storage
from dist_train.tracking.digests import Digests, file_name
from dist_train.views.compare import compare_runs
from dist_train.views.parting import disagreement, parting

CONFIG = f"""
extends: {CONFIGS / "digits.yaml"}
data: {{num_workers: 0}}
trainer: {{duration: 20step, log_every: 7step, evaluate_every: 10step, ema_decay: 0.9, clip_grad_norm: 1.0}}
checkpoint: {{every: 5step, keep_last: 9}}
debug: {{digest: true}}
tracking: {{tensorboard: false, report: false}}
"""
WEIGHT = "classifier.2.weight"
BITWISE = ("distributed.reproducibility=bitwise", "trainer.micro_batch_size=8")


def fault(kind: str, step: int, rank: int = 0) -> str:
    return f"callbacks=[{{_target_: faults.{kind}, step: {step}, rank: {rank}}}]"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two; no test changes one."""

    def make(folder: Path) -> None:
        shutil.copy(Path(__file__).parent / "programs" / "faults.py", folder)
        (folder / "c.yaml").write_text(CONFIG)
        alone = [
            ["c.yaml", "run.name=one"],
            ["c.yaml", "run.name=again", "debug.trace_samples=true", "trainer.log_every=6step"],
            ["c.yaml", "run.name=seed", "seed=1"],
            ["c.yaml", "run.name=lr", "trainer.stop_at=9step"],
            ["c.yaml", "run.name=lr", "optimizer.lr=0.2", "checkpoint.accept_changes=true"],
            ["c.yaml", "run.name=short", "trainer.stop_at=9step"],
            ["c.yaml", "run.name=plain", "debug.digest=false"],
            ["c.yaml", "run.name=plain_seed", "debug.digest=false", "seed=1"],
            ["c.yaml", "run.name=bitwise1", *BITWISE],
            ["c.yaml", "run.name=skip", "trainer.on_nonfinite=skip", fault("InfiniteGradient", 6)],
        ]
        run_several(folder, 1, alone)
        both = [
            ["c.yaml", "run.name=two"],
            ["c.yaml", "run.name=gradient", fault("FlippedGradient", 7, rank=1)],
            ["c.yaml", "run.name=weight", fault("FlippedWeight", 6, rank=1)],
            ["c.yaml", "run.name=shrunk", "trainer.stop_at=9step"],
            ["c.yaml", "run.name=bitwise2", *BITWISE],
            ["c.yaml", "run.name=bitwise_less", *BITWISE, "trainer.stop_at=9step"],
            ["c.yaml", "run.name=bitwise_gradient", *BITWISE, fault("FlippedGradient", 7, rank=1)],
        ]
        run_several(folder, 2, both)

    return made_once(tmp_path_factory, "compared", make)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def compare(here: Path, capsys: pytest.CaptureFixture[str]) -> object:
    """The exit code of the command for two runs by name, and what it printed."""

    def call(one: str, other: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["compare", f"runs/{one}", f"runs/{other}"])
        found = capsys.readouterr()
        return code, found.out + found.err

    return call


def digests(folder: Path, name: str, rank: int = 0) -> Digests:
    return Digests.parse((folder / "runs" / name / file_name(rank)).read_bytes())


def of(found: Digests, prefix: str) -> dict[str, np.ndarray]:
    """The columns of names with a prefix."""
    return {name: found.values[:, k] for k, name in enumerate(found.names) if name.startswith(prefix)}


def test_two_equal_runs_are_equal(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("one", "again")
    assert code == 0
    assert out.startswith("equal: the digests of 23 tensors in 20 steps (1 to 20) on 1 rank, ")
    assert "both completed at step 20" in out
    assert json.loads((here / "runs/one/result.json").read_text())["weights_sha256"] in out
    assert compare("two", "two")[0] == 0


def test_everything_is_recorded_and_changes_from_step_to_step(here: Path) -> None:
    for name, rank in (("one", 0), ("two", 1)):
        found = digests(here, name, rank)
        assert found.steps.tolist() == list(range(1, 21))
        kinds = [name.partition(" ")[0] for name in found.names]
        assert [kinds.count(kind) for kind in ("loss", "gradient", "weight", "buffer")] == [1, 8, 8, 6]
        assert (found.values != 0).all()
        assert (found.values[1:] != found.values[:-1]).all()


def test_another_seed_is_another_run_from_the_first_step(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("one", "seed")
    assert code == 1
    assert out.startswith("different: runs/one and runs/seed part at step 1, in the loss\n")
    assert "23 of 23 tensors differ" not in out, "num_batches_tracked is the same"
    assert "22 of 23 tensors differ" in out or "21 of 23 tensors differ" in out
    assert "seed: 0 -> 1" in out


def test_another_learning_rate_shows_in_the_weights_of_its_first_step(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    """The gradient of that step is the same."""
    code, out = compare("one", "lr")
    assert code == 1
    assert "runs/one and runs/lr part at step 10, in the weight features.0.weight" in out
    assert "8 of 23 tensors differ at this step" in out
    assert "and 3 more" in out
    assert "equal in the 9 steps before it" in out
    assert "optimizer.lr: 0.1 -> 0.2" in out


def test_one_process_and_two_differ_in_their_bits(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("one", "two")
    assert code == 1
    assert "part at step 1, in " in out
    assert "processes: 1 -> 2" in out


def test_a_flipped_bit_in_one_ranks_gradient_is_found_at_its_step(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("two", "gradient")
    assert code == 1
    assert out.startswith(f"different: runs/two and runs/gradient part at step 7, in the gradient of {WEIGHT}\n")
    assert "on ranks 0, 1" in out, "after the reduction both have it"
    assert "the ranks of" not in out
    for rank in (0, 1):
        one, other = digests(here, "two", rank), digests(here, "gradient", rank)
        gradients, changed = of(one, "gradient"), of(other, "gradient")
        wrong = [name for name, values in gradients.items() if values[6] != changed[name][6]]
        assert wrong == [f"gradient {WEIGHT}"], "the other gradients of that step are the same"
        assert (one.values[:6] == other.values[:6]).all()


def test_bitwise_runs_on_one_process_and_on_two_are_equal_and_a_flipped_bit_is_found(compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("bitwise1", "bitwise2")
    assert code == 0
    assert out.startswith("equal: the digests of 23 tensors in 20 steps (1 to 20) on 1 and 2 ranks, ")
    code, out = compare("bitwise1", "bitwise_gradient")
    assert code == 1
    assert out.startswith(
        f"different: runs/bitwise1 and runs/bitwise_gradient part at step 7, in the gradient of {WEIGHT}\n"
    )
    assert "the ranks of" not in out
    assert "processes" not in out, "on which nothing depends"


def test_a_bitwise_run_that_goes_on_with_fewer_ranks_is_the_same_run(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    run(here, 1, "--config", "c.yaml", "run.name=bitwise_less", *BITWISE)
    assert [len(digests(here, "bitwise_less", rank).steps) for rank in (0, 1)] == [20, 9]
    code, out = compare("bitwise1", "bitwise_less")
    assert code == 0, out
    code, out = compare("bitwise2", "bitwise_less")
    assert code == 0, out


def test_a_weight_that_one_rank_changes_is_a_disagreement_of_the_ranks(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("two", "weight")
    assert code == 1
    first, *more = out.splitlines()
    assert first == f"different: runs/two and runs/weight part at step 6, in the weight {WEIGHT}"
    assert f"different: the ranks of runs/weight part at step 6, in the weight {WEIGHT}" in more
    assert "1 of 23 tensors differ at this step" in more[0]
    assert more[1] == "  on rank 1 (each rank against the same rank)"
    assert "the ranks of runs/two" not in out
    code, out = compare("weight", "weight")
    assert code == 1, "it is the same as itself, but its ranks don't agree"
    assert "on rank 1 (against rank 0)" in out


def test_batchnorm_statistics_may_differ_between_the_ranks_unless_the_run_is_bitwise(
    here: Path, tmp_path: Path
) -> None:
    ranks = {rank: digests(here, "two", rank) for rank in (0, 1)}
    assert (of(ranks[0], "buffer features.1.running_mean")["buffer features.1.running_mean"] !=
            of(ranks[1], "buffer features.1.running_mean")["buffer features.1.running_mean"]).all()  # fmt: skip
    assert disagreement(ranks, buffers=False) is None
    found = disagreement(ranks, buffers=True)
    assert found is not None
    assert (found.step, found.where) == (1, "the buffer features.1.running_mean")
    shutil.copytree(here / "runs/two", tmp_path / "two")
    config = (tmp_path / "two/config.yaml").read_text()
    assert "reproducibility: fast" in config
    (tmp_path / "two/config.yaml").write_text(config.replace("reproducibility: fast", "reproducibility: bitwise"))
    verdict = compare_runs(str(tmp_path / "two"), str(tmp_path / "two"))
    assert not verdict.equal
    assert "the buffer features.1.running_mean" in verdict.lines[0]


def test_a_run_that_was_killed_and_resumed_is_the_run_that_never_was(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    """Rank 1 is killed at step 13; the checkpoint of step 10 is the last, and both ranks' digests begin again there."""
    killed = here / "runs" / "killed"
    arguments = ("--config", "c.yaml", "run.name=killed", "checkpoint.asynchronous=false", fault("Killed", 13, rank=1))
    if not killed.exists():
        run(here, 2, *arguments, expect=1)
        assert not (killed / "result.json").exists()
        saved = max(int(path.name[5:]) for path in (killed / "checkpoints").glob("step-*"))
        for rank in (0, 1):
            assert digests(here, "killed", rank).steps[-1] >= saved == 10
        run(here, 2, *arguments)
    for rank in (0, 1):
        name = file_name(rank)
        assert (killed / name).read_bytes() == (here / "runs/two" / name).read_bytes()
    code, out = compare("two", "killed")
    assert code == 0, out


def test_a_run_that_goes_on_with_fewer_ranks_keeps_what_the_others_did(here: Path, compare) -> None:  # type: ignore[no-untyped-def]
    """Steps after the checkpoint, of a rank that doesn't come back, are of a past that didn't happen."""
    place, name = here / "runs" / "shrinks", file_name(1)
    if not place.exists():
        shutil.copytree(here / "runs/shrunk", place)
        before, whole = (place / name).read_bytes(), (here / "runs/two" / name).read_bytes()
        assert whole.startswith(before)
        (place / name).write_bytes(whole)
        train("c.yaml", "run.name=shrinks", "run.dir=runs")
        assert (place / name).read_bytes() == before
    assert digests(here, "shrinks", 0).steps.tolist() == list(range(1, 21))
    assert digests(here, "shrinks", 1).steps.tolist() == list(range(1, 10))
    code, out = compare("shrinks", "shrinks")
    assert code == 0
    assert "on 2 ranks" in out
    assert "part at step 10, in " in compare("two", "shrinks")[1], "from there on one process added up"


def test_digests_that_a_start_without_them_leaves_end_at_its_checkpoint(here: Path, tmp_path: Path) -> None:
    place = tmp_path / "short"
    shutil.copytree(here / "runs/short", place)
    (place / file_name(0)).write_bytes((here / "runs/seed" / file_name(0)).read_bytes())
    train("c.yaml", "run.name=short", f"run.dir={tmp_path}", "debug.digest=false", "trainer.stop_at=12step")
    train("c.yaml", "run.name=short", f"run.dir={tmp_path}")
    found = Digests.parse((place / file_name(0)).read_bytes())
    assert found.steps.tolist() == [*range(1, 10), *range(13, 21)]
    assert (found.values[9:] == digests(here, "one").values[12:]).all()


def test_a_shorter_run_is_equal_so_far(compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("one", "short")
    assert code == 1
    assert out.startswith("equal so far: the digests of 23 tensors in 9 steps (1 to 9) on 1 rank")
    assert "runs/one is completed at step 20, runs/short preempted at step 9" in out


def test_checkpoints_after_the_last_digest_are_compared(here: Path, tmp_path: Path) -> None:
    for name, checkpoints in (("one", "one"), ("other", "seed")):
        shutil.copytree(here / "runs" / "one", tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree(here / "runs" / checkpoints / "checkpoints", tmp_path / name / "checkpoints")
    path = tmp_path / "other" / file_name(0)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:8]))
    verdict = compare_runs(str(tmp_path / "one"), str(tmp_path / "other"))
    assert not verdict.equal
    assert "part at step 10, in the checkpoint" in verdict.lines[0]


def test_without_digests_rows_checkpoints_and_final_weights_are_compared(here: Path, tmp_path: Path, compare) -> None:  # type: ignore[no-untyped-def]
    code, out = compare("one", "plain")
    assert code == 0
    assert "rows of metrics.jsonl, the checkpoints of 4 steps (5 to 20), the final weights" in out
    assert "debug.digest=true" in out
    code, out = compare("plain", "plain_seed")
    assert code == 1
    assert "part at step 5, in the checkpoint\n" in out
    assert "debug.digest=true" in out
    bare = [tmp_path / "one", tmp_path / "other"]
    for place, source in zip(bare, ("plain", "plain_seed"), strict=True):
        shutil.copytree(here / "runs" / source, place, ignore=shutil.ignore_patterns("checkpoints"))
    verdict = compare_runs(*map(str, bare))
    assert "part at step 7, in the train row of metrics.jsonl (means of steps 1 to 7)" in verdict.lines[0]
    for place in bare:
        (place / "metrics.jsonl").unlink()
    verdict = compare_runs(*map(str, bare))
    assert "part at step 20, in the final weights" in verdict.lines[0]


def test_a_last_bit_of_one_recorded_number_is_seen_and_the_clock_is_not(here: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        shutil.copytree(here / "runs/plain", tmp_path / name)
    path = tmp_path / "other" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"time": "later", "samples_per_s": 1.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare_runs(str(tmp_path / "one"), str(tmp_path / "other")).equal
    row = next(row for row in rows if row["split"] == "val" and row["step"] == 10)
    row["loss"] = float(np.nextafter(row["loss"], 9.0))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = compare_runs(str(tmp_path / "one"), str(tmp_path / "other"))
    assert "part at step 10, in the val row of metrics.jsonl" in verdict.lines[0]
    assert "loss: " in verdict.lines[1]


def test_a_skipped_step_is_recorded_as_one_that_changed_no_weight(here: Path) -> None:
    found = digests(here, "skip")
    weights, gradients = of(found, "weight"), of(found, "gradient")
    assert all(values[5] == values[4] != values[6] for values in weights.values())
    assert all(len(set(values.tolist())) == 20 for values in gradients.values())


@pytest.mark.parametrize("missing", ["config.yaml", "everything to compare"])
def test_what_cant_be_compared_is_exit_code_2_with_what_to_do(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for file in ("status.json", *(["config.yaml"] if missing != "config.yaml" else [])):
            shutil.copy(here / "runs/one" / file, tmp_path / name)
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "other")]) == 2
    err = capsys.readouterr().err
    assert ("has no config.yaml" in err) if missing == "config.yaml" else ("debug.digest=true" in err)


def test_a_manifest_that_cant_be_read_is_refused_instead_of_left_out(here: Path, tmp_path: Path) -> None:
    shutil.copytree("runs/one", tmp_path / "one")
    manifest = next((tmp_path / "one/checkpoints").glob("step-*/manifest.json"))
    manifest.write_bytes(manifest.read_bytes()[:-40])
    with pytest.raises(ConfigError, match=r"manifest\.json.*verify"):
        compare_runs("runs/one", str(tmp_path / "one"))


def test_digests_that_cant_be_read_are_exit_code_2_and_a_torn_end_is_nothing(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(here / "runs/one", tmp_path / "one")
    path = tmp_path / "one" / file_name(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    pair = ["runs/one", str(tmp_path / "one")]
    assert main(["compare", *pair]) == 0
    assert "in 19 steps (1 to 19)" in capsys.readouterr().out
    path.write_bytes(whole.replace(b'{"step": 5, "digests": "', b'{"step": 5, "digests": "x'))
    assert main(["compare", *pair]) == 2
    assert f"{file_name(0)}: line 6: " in capsys.readouterr().err
    assert main(["compare", "runs/one"]) == 2


def test_a_run_under_a_url_has_the_same_digests(here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped and resumed on another host."""
    place = f"memory://{uuid.uuid4().hex}"
    for number, stop in enumerate(("trainer.stop_at=9step", "trainer.stop_at=null")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"host{number}"))
        train("c.yaml", f"run.dir={place}", "run.name=far", stop)
    storage = open_storage(f"{place}/far")
    assert storage.read_bytes(file_name(0)) == (here / "runs/one" / file_name(0)).read_bytes()
    verdict = compare_runs("runs/one", f"{place}/far")
    assert verdict.equal, verdict.lines


def test_runs_are_compared_without_torch(here: Path) -> None:
    code = "import sys; from dist_train.main import main; code = main(['compare', 'runs/one', 'runs/seed']); "
    code += "sys.exit(code + 10 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr


def made(rows: list[tuple[int, list[int]]], names: list[str]) -> Digests:
    return Digests(names, np.array([step for step, _ in rows]), np.array([values for _, values in rows], np.uint64))


def test_gaps_other_orders_and_tensors_of_one_run_alone_are_aligned_by_step_and_name() -> None:
    one = made([(step, [10 + step, 20 + step, 0]) for step in (1, 2, 5, 6)], ["loss", "weight w", "gradient w"])
    other = made([(step, [20 + step, 10 + step]) for step in (2, 3, 4, 5, 6)], ["weight w", "loss"])
    assert parting({0: one}, {0: other}) is None
    more = made([(step, [20 + step, 10 + step, 7]) for step in (5, 6)], ["weight w", "loss", "buffer b"])
    found = parting({0: one}, {0: more})
    assert found is not None
    assert (found.step, found.where) == (5, "the buffer b (in one of them only)")
    assert "first step that both have" in found.details[-1]


def test_the_first_tensor_of_a_step_is_the_loss_then_a_gradient_then_a_weight() -> None:
    names = ["buffer b", "weight v", "weight w", "gradient v", "loss"]
    one = made([(1, [1, 1, 1, 1, 1]), (2, [1, 1, 1, 1, 1])], names)
    other = made([(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1, 2, 1])], names)
    found = parting({0: one, 3: one}, {0: one, 3: other})
    assert found is not None
    assert (found.step, found.where) == (2, "the gradient of v")
    assert found.details[0].endswith(
        "3 of 5 tensors differ at this step: the gradient of v, the weight v, the buffer b"
    )
    assert found.details[1].startswith("on rank 3 ")
