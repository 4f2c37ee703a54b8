"""Secrets stay out of all that is written: a config that holds one is refused, and what errors and libraries say is masked.

Nothing here knows every secret: what counts are the password in a URL and its signed query, arguments named like `token` or
`api_key`, and the values of environment variables that are named so. Mask before a text is cut or quoted once more: half a
secret isn't recognized. What can't be seen (control characters, bytes that are no UTF-8) is shown as an escape by `visible`.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Iterator
from typing import Any

MASK = "***"
CURE = (
    "leave it out: the code can read it from the environment (os.environ), and fsspec takes credentials from the environment "
    "or from its own file (AWS_ACCESS_KEY_ID, FSSPEC_S3_KEY, ~/.config/fsspec)"
)
SHORTEST = 8  # characters of a variable's value that is masked; a shorter one may be an ordinary word
REFUSED = 16  # and of one that is refused: a weak password may well be a part of a path
_ARGUMENT = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|credential|api_?key|(access|account|secret|private)_key)s?$"
    r"|^((auth|access|api|bearer|hf|use_auth)_)?token$|_(auth|access|refresh|session|security|secret|service|bearer)_token$"
    r"|^(github|gitlab|wandb|session|refresh|security|secret|service|oauth|jwt)_token$"
)
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
    for name, value in os.environ.items():
        if len(value) >= shortest and _is_secret(name):
            for form in _forms(value):
                text = text.replace(form, MASK)
    return _IN_URL.sub(lambda found: (found[1] or "") + MASK, text)


@functools.cache
def _is_secret(variable: str) -> bool:
    return _VARIABLE.search(variable) is not None


@functools.cache
def _forms(value: str) -> list[str]:
    """A value as it is, and as it stands in a text that quotes it; the longest first."""
    forms = {value, value.strip(), repr(value)[1:-1], json.dumps(value)[1:-1], html.escape(value)}
    return sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True)


def visible(text: str, keep: str = "\n\t") -> str:
    """The text with escapes (`\\x1b`, `\\udcff`) for what a terminal would obey or a file can't hold; `keep` stays."""
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def said(error: BaseException) -> str:
    """`str(error)`, also where its own `__str__` fails."""
    try:
        return str(error)
    except Exception as wrong:
        return f"(its __str__ raises {type(wrong).__name__})"


def holds_secret(text: str) -> bool:
    """Whether such a thing is in a text that would be recorded."""
    return mask(text, REFUSED) != text


def found_in(value: Any, key: str = "", named: bool = False) -> Iterator[tuple[str, str]]:
    """Every secret in a config of plain values: its dotted key, and what to do about it.

    named: something above is called like a secret, so that all below is one.
    """
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", str(name)).lower()
            where = f"{key}.{name}" if key else str(name)
            if holds_secret(str(name)):
                yield (
                    mask(where, REFUSED),
                    f"this key holds a secret, which would be written into the run's records; {CURE}",
                )
            yield from found_in(inner, where, named or _ARGUMENT.search(words) is not None)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        if holds_secret(str(value)):
            said = mask(str(value), REFUSED)
            yield key, f"{said} holds a secret, which would be written into the run's records; {CURE}"
        elif named and value != "":
            yield key, f"a secret would be written into the run's records; {CURE}"
