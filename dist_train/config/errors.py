"""Config errors: every mistake at once, each with its place; and text made safe to write: secrets masked, escapes shown.

A config that holds a secret is refused, and secrets in the messages of errors and libraries are masked. What counts as a secret:
the password in a URL and its signed query, arguments named like `token` or `api_key`, and the values of environment variables
with such names. Mask before a text is truncated or quoted again: half a secret isn't recognized.
"""

from __future__ import annotations

import difflib
import functools
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MASK = "***"
SECRET_HINT = (
    "leave it out: the code can read it from the environment (os.environ), and fsspec takes credentials from the environment "
    "or from its own file (AWS_ACCESS_KEY_ID, FSSPEC_S3_KEY, ~/.config/fsspec)"
)
SHORTEST = 8  # characters of a variable's value that is masked; a shorter one may be an ordinary word
REFUSED = 16  # and of one that a config may not hold: a short password may be part of a path
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_VARIABLE = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|(API|ACCESS|ACCOUNT|SECRET|PRIVATE)_?KEY)$", re.IGNORECASE
)
_IN_URL = re.compile(
    r"(?<=://)[^\s/?#@:'\"]*:[^\s/?#@'\"]+(?=@)"  # user:password@
    r"|(?<=http://)[^\s/?#@'\"]+(?=@)|(?<=https://)[^\s/?#@'\"]+(?=@)"  # a token in the user's place
    r"|(?<=[?&])((?:[\w.-]*(?:token|signature|secret|password|passwd|credential|api_?key|accesskeyid)|sig|key)=)[^\s&'\"]+",
    re.IGNORECASE,
)


def mask(text: str, shortest: int = SHORTEST) -> str:
    """The text with `***` in place of what looks like a secret, or is the value of an environment variable that holds one."""
    environment: Any = os.environ
    for form in _secrets(
        tuple(environment._data.items()), shortest
    ):  # as bytes: decoding all of it takes 50 times as long
        text = text.replace(form, MASK)
    return _IN_URL.sub(lambda found: (found[1] or "") + MASK, text)


@functools.lru_cache(maxsize=4)
def _secrets(environment: tuple[tuple[bytes, bytes], ...], shortest: int) -> list[str]:
    """The values of variables that hold secrets, as they are and as they are quoted in other text, each one's longest first."""
    found = []
    for name, value in ((os.fsdecode(name), os.fsdecode(value)) for name, value in environment):
        if _VARIABLE.search(name) is not None and len(value) >= shortest:
            forms = {value, value.strip(), repr(value)[1:-1], json.dumps(value)[1:-1], html.escape(value)}
            found += sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True)
    return found


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with escapes (`\\x1b`, `\\udcff`) for control characters and what UTF-8 can't encode, except `keep`."""
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def error_text(error: BaseException) -> str:
    """`str(error)`, also if its `__str__` raises."""
    try:
        return str(error)
    except Exception as wrong:
        return f"(its __str__ raises {type(wrong).__name__})"


def holds_secret(text: str) -> bool:
    """Whether a secret is in a text that would be recorded."""
    return mask(text, REFUSED) != text


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

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: where the code that found the mistake stands helps nobody."""
        return f"{type(self).__name__}: {self}".splitlines()


def did_you_mean(word: object, known: Iterable[str], *, prefix: str = "") -> str:
    """`; did you mean X?` with the nearest of `known`, or an empty string."""
    words = list(known)
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.6)
    near = near or [name for name in words if len(str(word)) > 2 and name.startswith(str(word))]
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def describe(value: object) -> str:
    """A value as messages describe it: `the string '0,1'`, `the number 3`, `a list`, `nothing (null)`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        value = mask(value)  # before it is truncated
        return f"the string {value if len(value) <= 60 else value[:57] + '...'!r}"
    if isinstance(value, int | float):
        return f"the number {value!r}"
    if isinstance(value, dict):
        inside = ", ".join(str(key) for key in list(value)[:3]) + (", ..." if len(value) > 3 else "")
        return f"a mapping ({inside})" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return f"an object of class {type(value).__module__}.{type(value).__qualname__}"
