"""Names: of a run, from a template with `{time}`, `{job}` and any key of the config; and what a metric's name says of it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .schema import Config

PLACEHOLDER = re.compile(r"\{([\w.]+)\}")


def expand_name(template: str, config: Config, *, time: str, job: str) -> str:
    """Fill `{time}`, `{job}` and keys like `{optimizer.lr}` in; what isn't safe in a path becomes `-`.

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
        return re.sub(r"[^\w.=+-]+", "-", str(value)).strip("-.") or "none"

    return PLACEHOLDER.sub(fill, template)


def better_is_lower(metric: str) -> bool:
    """Whether less of a metric is better, judged by its name, as `mode: auto` does."""
    name = metric.rsplit("/", 1)[-1].lower()
    return any(part in name for part in ("loss", "error", "mae", "mse", "perplexity", "nll"))
