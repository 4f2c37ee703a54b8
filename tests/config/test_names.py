from __future__ import annotations

import pytest

from dist_train.config.load import load_config
from dist_train.config.names import expand_name


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("digits", "digits"),
        ("{time}-{job}", "20260102-030405-77_1"),
        ("lr{optimizer.lr}-s{seed}", "lr0.1-s0"),
        ("{optimizer._target_}", "SGD"),
        ("{data.global_batch_size}/x", "64/x"),
        ("{trainer.stop_at}", "None"),
        ("{data.train}", "_target_-dist_train.data.Digits-split-train"),
    ],
)
def test_a_template_is_filled_in(template: str, name: str) -> None:
    assert expand_name(template, load_config(), time="20260102-030405", job="77_1") == name


def test_what_is_unsafe_in_a_path_is_replaced() -> None:
    config = load_config(None, ["run.dir=../a b//c:d*"])
    assert expand_name("{run.dir}", config, time="", job="") == "a-b-c-d"
    assert expand_name("{job}", config, time="", job="../..") == "none"
