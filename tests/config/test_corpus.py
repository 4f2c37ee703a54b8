"""Every bad config of bad_configs.txt is answered with exactly the messages written in it, each at its line.

In that file `# ! key: message` is on the line that the message must name; `# ! command line: ...` and `# override:`
are at the top.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dist_train.config.errors import ConfigError, Problem
from dist_train.config.load import load_config
from dist_train.config.slots import check_components

BLOCKS = [
    block.partition("\n")[::2]
    for block in re.split(r"^=== ", Path(__file__).with_name("bad_configs.txt").read_text(), flags=re.M)[1:]
]


def problems_of(path: str, overrides: list[str]) -> list[Problem]:
    try:
        return check_components(load_config(path, overrides))
    except ConfigError as error:
        return error.problems


def expected(text: str) -> list[str]:
    messages = []
    for number, line in enumerate(text.splitlines(), start=1):
        _, mark, message = line.partition("# ! ")
        if mark:
            messages += (
                [message]
                if message.startswith("command line")
                else [f"bad.yaml:{number}: {m}" for m in message.split(" | ")]
            )
    return messages


@pytest.mark.parametrize(("name", "text"), BLOCKS, ids=[name for name, _ in BLOCKS])
def test_a_bad_config_is_answered_in_full(name: str, text: str, folder: Path) -> None:
    (folder / "bad.yaml").write_text(text)
    overrides = re.findall(r"^# override: (.*)$", text, flags=re.M)

    assert [str(problem) for problem in problems_of("bad.yaml", overrides)] == expected(text)


def test_the_corpus_is_large_and_says_something_everywhere() -> None:
    assert len(BLOCKS) >= 45
    assert all(expected(text) for _, text in BLOCKS)
    assert len({name for name, _ in BLOCKS}) == len(BLOCKS)


def test_the_base_of_the_corpus_is_good(folder: Path) -> None:
    assert problems_of("base.yaml", []) == []
