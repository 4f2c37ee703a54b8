"""Values of `scheduler`: its warm-up, and the words and durations that stand for numbers among its arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .errors import describe
from .fields import Duration


@dataclass(frozen=True)
class Warmup:
    """`scheduler.warmup`.

    Attributes:
        duration: in epochs or steps.
        start: the share of the lr that it starts from; None: that of one step.
    """

    duration: Duration
    start: float | None = None

    @classmethod
    def parse(cls, value: Any) -> Warmup:
        """Read `500step` or `{duration: 500step, from: 0.01}`. Raises ValueError that says what is expected."""
        form = "expected a duration like 500step, or {duration: 500step, from: 0.01}"
        if not isinstance(value, dict):
            return cls(Duration.parse_count(value))
        if not {"duration"} <= value.keys() <= {"duration", "from"}:
            raise ValueError(f"{form}, found {describe(value)}")
        start = value.get("from")
        if start is not None and (isinstance(start, bool) or not isinstance(start, int | float) or not 0 < start <= 1):
            raise ValueError(f"expected a share of the lr above 0 and at most 1 for `from`, found {describe(start)}")
        return cls(Duration.parse_count(value["duration"]), start)


_COUNT = re.compile(r"(total_steps\s*-)?\s*(\d+\s*(?:ep|step))")


def schedule_count(text: Any) -> tuple[bool, Duration] | None:
    """`5ep` or `total_steps - 5ep` among a scheduler's arguments: whether it counts from the end, and the duration; else None."""
    match = _COUNT.fullmatch(text) if isinstance(text, str) else None
    return (match[1] is not None, Duration.parse(match[2])) if match is not None else None


def is_schedule_number(value: Any) -> bool:
    """Whether a scheduler's argument stands for a number: `total_steps`, `steps_per_epoch`, `5ep`, `total_steps - 5ep`."""
    return value in ("total_steps", "steps_per_epoch") or schedule_count(value) is not None
