from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_train.config import components
from dist_train.config.errors import ConfigError
from dist_train.config.fields import Duration
from dist_train.config.load import DEFAULT, KEYS, load_config
from dist_train.config.source import Place, Reader, dump

ROOT = Path(__file__).parents[2]


def error_of(source: object, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    return str(caught.value)


def minimal(**more: object) -> dict[str, object]:
    return {
        "data": {"train": {"_target_": "dist_train.data.Digits"}},
        "model": {"_target_": "torch.nn.Linear", "in_features": 64, "out_features": 10},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        **more,
    }


def test_every_shipped_config_loads_and_its_components_fit() -> None:
    from dist_train.config.slots import check_components

    for path in [*sorted((ROOT / "configs").glob("*.yaml")), None]:
        assert check_components(load_config(path)) == []


def test_the_built_in_default_is_the_digits_config() -> None:
    text = (ROOT / "configs" / "digits.yaml").read_text()
    assert DEFAULT.read_text() == text
    assert load_config().run.name == "digits"


def test_values_have_their_types_and_sections_are_attributes() -> None:
    config = load_config(None, ["trainer.duration=3ep", "optimizer.lr=1e-3", "distributed.bucket_mb=10"])
    assert config.trainer.duration == Duration(3, "ep")
    assert config.optimizer["lr"] == 0.001
    assert type(config.distributed.bucket_mb) is float
    assert config.checkpoint.every == [Duration(1, "ep"), Duration(900.0, "s")]
    assert config.get("data.augment.0.pixels") == 1
    assert config.get("trainer.duration") == "3ep"
    with pytest.raises(KeyError, match=r"optimizer\.lrr"):
        config.get("optimizer.lrr")


def test_the_resolved_config_reads_back_equal_by_every_yaml_reader(folder: Path) -> None:
    config = load_config("base.yaml", ["run.name=off", "optimizer.lr=1e-05", 'model.note="1e-3"', 'model.at="12:30"'])
    text = config.to_yaml()
    assert yaml.safe_load(text) == config.to_dict()
    (folder / "again.yaml").write_text(text)
    assert load_config("again.yaml").to_dict() == config.to_dict()
    assert load_config(config.to_dict()).to_dict() == config.to_dict()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@settings(deadline=None)
@given(st.recursive(LEAVES, st.lists, max_leaves=5))
def test_whatever_is_written_reads_back_equal(value: object) -> None:
    reader = Reader()
    node = reader.parse(dump({"x": value}), Place(0, "x", 1))
    assert reader.noted == []
    assert node is not None
    assert node.plain() == {"x": value}


def test_yaml_is_read_by_the_rules_of_version_1_2(folder: Path) -> None:
    (folder / "x.yaml").write_text(
        "{a: 1e-3, b: off, c: yes, d: 12:30, e: 0o17, f: .inf, h: 017, i: 2024-01-01, j: 1_000, k: true, l: -.5, m: }"
    )
    assert Reader().file("x.yaml").plain() == {
        "a": 0.001, "b": "off", "c": "yes", "d": "12:30", "e": 15, "f": float("inf"), "h": "017",
        "i": "2024-01-01", "j": "1_000", "k": True, "l": -0.5, "m": None,
    }  # fmt: skip


def test_extends_merges_deeply_and_later_bases_win(folder: Path) -> None:
    (folder / "one.yaml").write_text(
        "extends: base.yaml\ntrainer: {duration: 1ep, clip_grad_norm: 1}\noptimizer: {momentum: 0.9}\n"
    )
    (folder / "two.yaml").write_text("trainer: {duration: 2ep}\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "top.yaml").write_text("extends: [../one.yaml, ../two.yaml]\noptimizer: {lr: 0.5}\n")
    config = load_config("sub/top.yaml")
    assert str(config.trainer.duration) == "2ep"
    assert config.trainer.clip_grad_norm == 1.0
    assert config.optimizer == {"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.9}
    assert config.where("trainer.duration") == "two.yaml:1"
    assert config.where("optimizer.lr") == "sub/top.yaml:2"
    assert config.run.name == "top"


def test_another_target_drops_the_inherited_arguments(folder: Path) -> None:
    (folder / "x.yaml").write_text("extends: base.yaml\nmodel: {_target_: mynet.Net, width: 3}\n")
    assert load_config("x.yaml").model == {"_target_": "mynet.Net", "width": 3}
    (folder / "x.yaml").write_text("extends: base.yaml\nmodel: {_target_: torch.nn.Linear, out_features: 3}\n")
    assert load_config("x.yaml").model == {"_target_": "torch.nn.Linear", "in_features": 64, "out_features": 3}


def test_an_overridden_target_drops_them_too_in_any_order(folder: Path) -> None:
    config = load_config("base.yaml", ["model.width=3", "model._target_=mynet.Net"])
    assert config.model == {"_target_": "mynet.Net", "width": 3}
    assert load_config("base.yaml", ["model={_target_: mynet.Net}"]).model == {"_target_": "mynet.Net"}


def test_circular_extends_are_reported_as_a_chain(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: b.yaml\n")
    (folder / "b.yaml").write_text("seed: 3\nextends: a.yaml\n")
    assert error_of("a.yaml") == "b.yaml:2: extends: circular extends: a.yaml -> b.yaml -> a.yaml"


def test_a_mistake_in_a_base_is_reported_at_its_own_line(folder: Path) -> None:
    (folder / "bad_base.yaml").write_text("extends: base.yaml\ntrainer:\n  epochs: 4\n")
    (folder / "x.yaml").write_text("extends: bad_base.yaml\nsed: 3\n")
    assert error_of("x.yaml").splitlines() == [
        "bad_base.yaml:3: trainer.epochs: unknown key; the number of epochs is trainer.duration=4ep",
        "x.yaml:2: sed: unknown key; did you mean seed?",
    ]


def test_overrides_reach_lists_and_make_what_is_missing(folder: Path) -> None:
    config = load_config(
        "base.yaml",
        ["metrics.0=top5", "metrics.1=accuracy", "trainer.stop_when.metric=val/loss", "trainer.stop_when.below=0.1"],
    )
    assert config.metrics == ["top5", "accuracy"]
    assert config.trainer.stop_when is not None
    assert config.trainer.stop_when.below == 0.1
    assert load_config("base.yaml", ["run.name={time}-{optimizer.lr}"]).run.name == "{time}-{optimizer.lr}"


def test_a_missing_file_names_the_nearest_one(folder: Path) -> None:
    assert error_of("bass.yaml") == "bass.yaml: no such file; did you mean base.yaml?"
    assert error_of("none/x.yaml").startswith(f"none/x.yaml: no such file; there is no directory {folder}/none")


def test_an_empty_file_says_so(folder: Path) -> None:
    (folder / "x.yaml").write_text("# nothing\n")
    assert error_of("x.yaml") == "x.yaml:1: expected a mapping of keys, the file is empty"


def test_an_alias_of_itself_is_reported(folder: Path) -> None:
    (folder / "x.yaml").write_text("extends: base.yaml\nmodel: &m\n  _target_: mynet.Net\n  width: [*m]\n")
    assert "an alias (*) refers to something that contains it" in error_of("x.yaml")


def test_whole_numbers_stay_numbers_as_keys_of_an_argument(folder: Path) -> None:
    (folder / "x.yaml").write_text("extends: base.yaml\nloss: {_target_: mynet.huber, weights: {0: 1.5, 1: 2, a: 3}}\n")
    config = load_config("x.yaml")
    assert config.loss["weights"] == {0: 1.5, 1: 2, "a": 3}
    assert load_config(config.to_dict()).loss == config.loss
    (folder / "y.yaml").write_text(config.to_yaml())
    assert load_config("y.yaml").loss == config.loss


def test_anchors_work(folder: Path) -> None:
    (folder / "x.yaml").write_text("extends: base.yaml\ndata:\n  train: &d {_target_: a.B, split: x}\n  test: *d\n")
    assert load_config("x.yaml").data.test == {"_target_": "a.B", "split": "x"}


def test_user_code_is_looked_for_beside_the_config_and_where_the_config_says(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "x.yaml").write_text("extends: ../base.yaml\n")
    assert load_config("sub/x.yaml").run.code_paths == [str(folder / "sub"), str(folder)]
    (folder / "sub" / "x.yaml").write_text("extends: ../base.yaml\nrun: {code_paths: [../lib, /opt/code]}\n")
    assert load_config("sub/x.yaml").run.code_paths == [str(folder / "lib"), "/opt/code"]
    assert load_config("sub/x.yaml", ["run.code_paths=[lib]"]).run.code_paths == [str(folder / "lib")]
    assert load_config(minimal()).run.code_paths == [str(folder)]


def test_a_dict_may_hold_live_objects_which_are_kept_as_they_are() -> None:
    import torch

    model, data = torch.nn.Linear(2, 2), torch.utils.data.TensorDataset(torch.zeros(3, 2))
    weight = torch.ones(2)
    source = minimal(
        model=model, data={"train": data}, loss={"_target_": "torch.nn.CrossEntropyLoss", "weight": weight}
    )
    config = load_config(source, ["seed=4"])
    assert config.model is model
    assert config.data.train is data
    assert config.loss["weight"] is weight
    assert config.has_live_objects
    assert config.to_dict()["model"] == {"_live_": "torch.nn.modules.linear.Linear"}
    assert "seed" not in source
    assert config.run.name == "run"
    assert not load_config(minimal()).has_live_objects
    assert "resume from Python with the same object" in error_of(config.to_dict())


def test_a_class_that_can_be_imported_again_is_no_live_object() -> None:
    import torch

    config = load_config(minimal(model={"_target_": torch.nn.Linear, "in_features": 64, "out_features": 10}))
    assert config.model["_target_"] == "torch.nn.modules.linear.Linear"
    assert not config.has_live_objects

    class Local(torch.nn.Module):
        pass

    assert load_config(minimal(model={"_target_": Local})).has_live_objects


def test_mistakes_in_a_dict_are_reported_without_a_line() -> None:
    assert error_of(minimal(sede=3)) == "dict: sede: unknown key; did you mean seed?"


def test_sections_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config().trainer.duration = Duration(1, "ep")  # type: ignore[misc]


def test_schema_errors_come_without_torch_numpy_or_user_code(folder: Path) -> None:
    (folder / "mynet.py").write_text("raise SystemExit('imported')\nclass Net: pass\n")
    (folder / "x.yaml").write_text("extends: base.yaml\nmodel: {_target_: mynet.Net}\nseed: x\noptimizer: {lrr: 3}\n")
    command = [sys.executable, str(Path(__file__).parent / "programs" / "read_bad_config.py")]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert result.stdout.split("\n") == ["2", "[]", ""], result.stderr


def test_whatever_is_in_a_config_is_read_or_refused_by_a_config_error() -> None:
    values = [
        None,
        True,
        -1,
        3.5,
        float("nan"),
        "x",
        "0,1",
        "5ep",
        "{time}",
        [],
        [[1]],
        {},
        {3: 4},
        {"a": 1},
        {"_target_": 3},
    ]
    keys = [
        *KEYS,
        "trainer.x",
        "model.z",
        "optimizer.groups",
        "optimizer._target_",
        "scheduler.every",
        "metrics.7",
        "3",
    ]
    random = Random(0)
    refused = 0
    for _ in range(300):
        picked = [(random.choice(keys), random.choice(values)) for _ in range(random.randint(1, 4))]
        written = {key: value for key, value in picked[:2] if "." not in key}
        try:
            load_config({**minimal(), **written}, [f"{key}={json.dumps(value)}" for key, value in picked])
        except ConfigError as error:
            refused += bool(str(error))
    assert refused > 200


TEXTS = ("12e4567", "001", "1e5", "yes", "1_000", "2024-01-01", "0o17", "0x1F", "true", "1.50", "+1", ".5", "12:30")


@pytest.mark.parametrize("text", [*TEXTS, "#1", "a #b"])
def test_a_text_stays_as_it_was_written(folder: Path, text: str) -> None:
    """In the file, quoted, by override, and read again from config.yaml, by the rules of YAML 1.1 too."""
    ways = {"override": (f"run.name={text}",), "quoted": (f"run.name='{text}'",)}
    configs = {way: load_config("base.yaml", overrides) for way, overrides in ways.items()}
    for way, written in (("file", text), ("quotes", f'"{text}"')) if text in TEXTS else ():
        Path(f"{way}.yaml").write_text(f"extends: base.yaml\nrun: {{name: {written}}}\n")
        configs[way] = load_config(f"{way}.yaml")
    for way, config in configs.items():
        Path("again.yaml").write_text(config.to_yaml())
        again = (load_config("again.yaml").run.name, yaml.safe_load(config.to_yaml())["run"]["name"])
        assert {config.run.name, *again} == {text}, way


def test_arguments_are_numbers_where_a_number_holds_what_was_written() -> None:
    written = ["1e-3", "007", "12e4567", "'1e5'", "1_000", "-1", "0.50"]
    values = [load_config(None, [f"model.bias={value}"]).get("model.bias") for value in written]
    assert values == [0.001, "007", "12e4567", "1e5", "1_000", -1, 0.5]


def test_the_last_override_of_a_key_counts() -> None:
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2
    assert load_config(None, ["optimizer.lr=1", "optimizer.lr=2"]).get("optimizer.lr") == 2
    assert (
        load_config(None, ["optimizer={_target_: torch.optim.SGD, lr: 1}", "optimizer.lr=2"]).get("optimizer.lr") == 2
    )


def test_variables_in_paths_are_filled_in_and_the_text_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/somewhere")
    monkeypatch.setenv("CONFIGS", str(folder))
    Path("x.yaml").write_text("extends: $CONFIGS/base.yaml\nrun: {dir: '${DATA}/runs', code_paths: [$DATA/code]}\n")
    config = load_config(
        "x.yaml", ["model.root=$DATA", "model.file=a/${DATA}/$$b", "model.regex=^x$", "model.cost=10$DATA"]
    )
    assert (config.run.dir, config.run.place, config.run.code_paths) == (
        "${DATA}/runs",
        "/somewhere/runs",
        ["/somewhere/code"],
    )
    assert load_config({"extends": "x.yaml"}).to_dict()["run"]["dir"] == "${DATA}/runs"
    assert config.get("model.root") == "$DATA"
    spec = {name: config.get(f"model.{name}") for name in ("root", "file", "regex", "cost")}
    built = components.build({"_target_": "builtins.dict", **spec})
    assert built == {"root": "/somewhere", "file": "a//somewhere/$b", "regex": "^x$", "cost": "10$DATA"}
