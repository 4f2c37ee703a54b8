"""What is wrong with a config, said once, all of it, with the place of each key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .secrets import mask, visible


@dataclass(frozen=True)
class Problem:
    """One mistake: `where` is "file:line", "command line" or "dict"; `key` the dotted key (may be empty)."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return visible(mask(": ".join(part for part in (self.where, self.key, self.message) if part)))


class ConfigError(Exception):
    """The config is wrong; nothing was started and nothing written. `problems` holds every mistake, in file order."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__(self.problems)

    @classmethod
    def single(cls, key: str, message: str, where: str = "") -> ConfigError:
        """The error of one mistake."""
        return cls([Problem(where, key, message)])

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


def did_you_mean(word: object, known: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean X?` with the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def describe(value: object) -> str:
    """A value in the words of a message: `the string '0,1'`, `the number 3`, `a list`, `nothing`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        value = mask(value)  # before it is cut
        return f"the string {value if len(value) <= 60 else value[:57] + '...'!r}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, dict):
        inside = ", ".join(str(key) for key in list(value)[:3]) + (", ..." if len(value) > 3 else "")
        return f"a mapping ({inside})" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return f"an object of class {type(value).__module__}.{type(value).__qualname__}"
