"""Names: of a run, from a template with `{time}`, `{job}` and any key of the config; variables in paths; what a metric's says."""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .schema import Config

PLACEHOLDER = re.compile(r"\{([\w.]+)\}")
_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")


def expand_path(path: str) -> str:
    """A path with `~`, `$NAME` and `${NAME}` filled in from the environment; `$$` is a dollar sign.

    Raises:
        ValueError: a variable isn't set.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name is not None and name not in os.environ:
            raise ValueError(
                f"{path} needs the environment variable {name}, which isn't set ($$ is a plain dollar sign)"
            )
        return "$" if name is None else os.environ[name]

    return os.path.expanduser(_VARIABLE.sub(fill, path))


def expand_argument(text: str) -> str:
    """An argument of a component: where it is a path with a variable (`$DATA`, `$DATA/x`, `a/${B}`), that is filled in.

    Raises:
        ValueError: a variable isn't set.
    """
    named = next((match for match in _VARIABLE.finditer(text) if match[0] != "$$"), None)
    return expand_path(text) if named is not None and (named.start() == 0 or "/" in text) else text


def expand_name(template: str, config: Config, *, time: str, job: str) -> str:
    """Fill `{time}`, `{job}` and keys like `{optimizer.lr}` in; what isn't safe in a path becomes `-`.

    Other values give other names: a text that loses something by this gets a few digits of its hash behind it.

    Raises:
        KeyError: the config has no such key (`load_config` has refused such a name before).
    """

    def fill(match: re.Match[str]) -> str:
        key = match.group(1)
        value: Any = {"time": time, "job": job}.get(key)
        if value is None:
            value = config.get(key)
        if isinstance(value, str) and key not in ("time", "job") and key.endswith("_target_"):
            value = value.rpartition(".")[2]
        if value and isinstance(value, list) and all(type(item) in (int, float) for item in value):
            value = "-".join(map(str, value))
        text = str(value)
        safe = re.sub(r"[^\w.=+-]+", "-", text)
        safe = safe if text[:1] == "-" and text == safe else safe.strip("-.")
        if (safe and safe == text) or key in ("time", "job"):
            return safe or "none"
        return f"{safe or 'none'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"

    return PLACEHOLDER.sub(fill, template)


_LOWER = ("loss", "error", "mae", "mse", "mape", "perplexity", "nll", "distance", "divergence")
_LOWER_WORDS = {"wer", "cer", "eer", "fid", "kid", "lpips", "ece", "brier", "ppl", "crps"}


def better_is_lower(metric: str) -> bool:
    """Whether less of a metric is better, judged by its name, as `mode: auto` does."""
    name = metric.rsplit("/", 1)[-1].lower()
    if name.startswith("neg_"):  # as scikit-learn turns errors into scores
        return False
    return any(part in name for part in _LOWER) or bool(_LOWER_WORDS & set(name.split("_")))
