"""Secrets stay out of all that is written: a config that holds one is refused, and what errors and libraries say is masked.

Nothing here knows every secret: what counts are the password in a URL and its signed query, arguments named like `token` or
`api_key`, and the values of environment variables that are named so.
"""

from __future__ import annotations

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
    r"(^|_)(password|passwd|passphrase|secret|api_?key|(access|account|secret|private)_key)$"
    r"|^((auth|access|api|bearer|hf|use_auth)_)?token$",
    re.IGNORECASE,
)
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
        if len(value) >= shortest and value in text and _VARIABLE.search(name):
            text = text.replace(value, MASK)
    return _IN_URL.sub(lambda found: (found[1] or "") + MASK, text)


def holds_secret(text: str) -> bool:
    """Whether such a thing is in a text that would be recorded."""
    return mask(text, REFUSED) != text


def found_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every secret in a config of plain values: its dotted key, and what to do about it."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from found_in(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and holds_secret(value):
        yield key, f"{mask(value)} holds a secret, which would be written into the run's records; {CURE}"
    elif isinstance(value, str) and value and _ARGUMENT.search(key.rpartition(".")[2]):
        yield key, f"a secret would be written into the run's records; {CURE}"
