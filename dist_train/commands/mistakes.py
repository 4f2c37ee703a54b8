"""What people write on a command line by the habits of other tools, answered with what to write here.

Every mistake is found before argparse sees the arguments: it would stop at the first, and knows no keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from dist_train.commands.usage import COMMANDS, Usage
from dist_train.config.errors import did_you_mean

COMMAND_LINE = "command line"


def is_config(word: str) -> bool:
    """Whether an argument is a config file by its name."""
    return word.endswith((".yaml", ".yml")) and "=" not in word


def command_of(words: Sequence[str]) -> str:
    """The command of a command line: its first word; `train` if that is a config, a key or an option."""
    first = words[0] if words else "train"
    plain = first[:1] != "-" and "=" not in first and not is_config(first)
    return first if first in COMMANDS or (plain and not _is_known(first)) else "train"


def unknown_command(name: str) -> str:
    """What to answer to a command that isn't there."""
    if told := _of_a_run(name):
        return told
    return f"unknown command {name!r}{did_you_mean(name, COMMANDS)}; commands: {', '.join(COMMANDS)}"


def mistakes(usage: Usage, words: list[str], flags: Mapping[str, bool]) -> Iterator[str]:
    """Options that the command doesn't have (`--epochs 3`, `-lr 0.1`), and keys without `=` (`optimizer.lr 0.1`).

    `flags` has the options that it has; of each one, whether it takes no value.
    """
    keys, at = usage.takes.endswith(("config", "keys")), 0
    while at < len(words):
        word, follows = words[at], words[at + 1 : at + 2]
        option, equals, value = word.partition("=")
        at += 1
        if option in flags:
            at += not (equals or flags[option])
        elif keys and "run" not in usage.takes and (told := _of_a_run(word)):
            yield told
        elif re.match("--?[A-Za-z]", word) or (keys and not equals and _is_known(word)):
            if not equals and follows and re.match("--|-[A-Za-z]|.*=", follows[0]) is None:
                word, value, at = f"{word} {follows[0]}", follows[0], at + 1
            yield word + ": " + (_answer(usage, option, value, flags) if keys else _no_option(usage, option, flags))


def _of_a_run(word: str) -> str:
    if not os.path.isfile(config := os.path.join(word, "config.yaml")):
        return ""
    return f"{word} is a run's directory: dist-train {config} resumes it"


def _is_key(name: str) -> bool:
    """Whether a config has this key, or may have it as an argument of a component."""
    from dist_train.config.schema import KEYS

    return name in KEYS or any(name.startswith(f"{key}.") for key in KEYS)


def _is_known(name: str) -> bool:
    """Whether it is a key here or in other tools."""
    from dist_train.config.load import foreign

    return name in foreign()[0] or _is_key(name)


def _answer(usage: Usage, option: str, value: str, flags: Mapping[str, bool]) -> str:
    from dist_train.config.load import example_of, foreign
    from dist_train.config.schema import KEYS

    name = option.lstrip("-").replace("-", "_")
    homes = [key for key in KEYS if name in (key, key.rpartition(".")[2])] or [name] * _is_key(name)
    if is_config(value) and "--config" in flags:
        return f"a config is given as --config {value}"
    if name in ("config", "run"):
        return f"{usage.name} takes {'a config and its keys' if '--config' in flags else 'the directory of a run'}"
    if name in foreign()[0]:
        told = foreign()[0][name].replace("{key}", name)
        told = told.replace("{value}", value) if value else example_of(told)
    elif homes:
        told = f"it is {homes[0]}={value or '...'}"
    else:
        return _no_option(usage, option, flags)
    return f"keys of a config are given as key=value; {told}"


def _no_option(usage: Usage, option: str, flags: Mapping[str, bool]) -> str:
    return f"{usage.name} has no option {option}{did_you_mean(option, flags)}; see dist-train {usage.name} --help"
