from __future__ import annotations

import pytest

from dist_train.config.changes import Change, compare, differing, refusal_message
from dist_train.config.fields import section_of, walk
from dist_train.config.load import load_config
from dist_train.config.schema import Config


def changes(*overrides: str) -> list[tuple[str, str]]:
    return [
        (change.key, change.kind) for change in compare(load_config().to_dict(), load_config(None, overrides).to_dict())
    ]


@pytest.mark.parametrize(
    ("override", "key", "kind"),
    [
        ("trainer.duration=3ep", "trainer.duration", "harmless"),
        ("trainer.stop_at=3ep", "trainer.stop_at", "harmless"),
        ("trainer.log_every=1step", "trainer.log_every", "harmless"),
        ("trainer.micro_batch_size=8", "trainer.micro_batch_size", "harmless"),
        ("data.num_workers=2", "data.num_workers", "harmless"),
        ("checkpoint.every=3ep", "checkpoint.every", "harmless"),
        ("optimizer.lr=0.2", "optimizer.lr", "consent"),
        ("optimizer={_target_: torch.optim.Adam}", "optimizer", "consent"),
        ("scheduler.warmup_steps=3", "scheduler.warmup_steps", "consent"),
        ("scheduler=null", "scheduler", "consent"),
        ("loss.label_smoothing=0", "loss.label_smoothing", "consent"),
        ("data.augment.0.pixels=2", "data.augment.0.pixels", "consent"),
        ("data.augment=[]", "data.augment", "consent"),
        ("trainer.clip_grad_norm=1", "trainer.clip_grad_norm", "consent"),
        ("trainer.precision=fp32", "trainer.precision", "consent"),
        ("trainer.ema_decay=0.9", "trainer.ema_decay", "consent"),
        ("seed=1", "seed", "refused"),
        ("data.global_batch_size=32", "data.global_batch_size", "refused"),
        ("data.drop_last=false", "data.drop_last", "refused"),
        ("data.shuffle=false", "data.shuffle", "refused"),
    ],
)
def test_each_key_is_of_its_kind(override: str, key: str, kind: str) -> None:
    assert changes(override) == [(key, kind)]


def test_in_bitwise_mode_the_size_of_micro_batches_changes_by_consent() -> None:
    old, new = (
        load_config(None, ["distributed.reproducibility=bitwise", f"trainer.micro_batch_size={size}"]).to_dict()
        for size in (8, 16)
    )
    assert compare(old, new) == [Change("trainer.micro_batch_size", 8, 16, "consent")]
    fast = load_config(None, ["trainer.micro_batch_size=8"]).to_dict()
    assert compare(old, fast) == [Change("distributed.reproducibility", "bitwise", "fast", "consent")]
    assert compare(fast, old) == [Change("distributed.reproducibility", "fast", "bitwise", "consent")]


def test_where_a_run_lives_and_how_it_is_started_is_no_change() -> None:
    assert changes("run.name=other", "run.dir=/x", "checkpoint.accept_changes=true", "checkpoint.resume=never") == []
    assert changes() == []


def test_equal_numbers_are_no_change_but_booleans_are_not_numbers() -> None:
    old = load_config(None, ["optimizer.lr=1", "optimizer.nesterov=true"]).to_dict()
    assert compare(old, load_config(None, ["optimizer.lr=1.0", "optimizer.nesterov=true"]).to_dict()) == []
    found = compare(old, load_config(None, ["optimizer.lr=1", "optimizer.nesterov=1"]).to_dict())
    assert [change.key for change in found] == ["optimizer.nesterov"]


def test_a_key_that_an_older_version_did_not_have_counts_as_its_default() -> None:
    new = load_config().to_dict()
    old = {**new, "trainer": {key: value for key, value in new["trainer"].items() if key != "ema_decay"}}
    del old["debug"]
    old["gone"] = 3
    assert compare(old, new) == []
    assert compare(old, load_config(None, ["trainer.ema_decay=0.5"]).to_dict()) == [
        Change("trainer.ema_decay", None, 0.5, "consent")
    ]


def test_the_refusal_shows_every_difference_and_the_fixes() -> None:
    found = compare(load_config().to_dict(), load_config(None, ["optimizer.lr=0.2", "data.val=null"]).to_dict())
    assert refusal_message(found, "runs/digits").splitlines() == [
        "the config differs from the one that runs/digits was trained with so far:",
        "    data.val      dist_train.data.Digits(split=val) -> null",
        "    optimizer.lr  0.1 -> 0.2",
        "  either start another run: run.name=ANOTHER_NAME",
        "  or resume with the new values from the newest checkpoint: checkpoint.accept_changes=true",
    ]
    found = compare(load_config().to_dict(), load_config(None, ["optimizer.lr=0.2", "seed=1"]).to_dict())
    assert refusal_message(found, "runs/digits").splitlines() == [
        "the config differs from the one that runs/digits was trained with so far:",
        "    seed          0 -> 1  (can't change within a run)",
        "    optimizer.lr  0.1 -> 0.2",
        "  restore the old value, or start another run: run.name=ANOTHER_NAME",
    ]


def test_every_key_is_described_and_of_a_known_kind() -> None:
    for key, field in walk(Config):
        assert field.description, key
        assert section_of(field) or field.json_schema_extra["change"] in ("harmless", "consent", "refused"), key  # type: ignore[index, call-overload]


def test_differences_compare_leaf_by_leaf() -> None:
    one = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": {}}
    two = {"a": 1, "b": {"c": [1, 3]}, "e": {"f": 2}}
    assert differing([one, two]) == [("b.c.1", "2", "3"), ("b.d", "None", "-"), ("e", "{}", "-"), ("e.f", "-", "2")]
    assert differing([one, one, one]) == []
