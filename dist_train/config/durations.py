"""Lengths of training that carry their unit: `20ep`, `500step`, `10min`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATTERN = re.compile(r"\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_SECONDS = {"s": 1, "min": 60, "h": 3600}
UNITS = "ep (epochs), step (optimizer steps), s, min or h"


@dataclass(frozen=True)
class Duration:
    """`value` epochs (`ep`, an int), optimizer steps (`step`, an int) or seconds (`s`, a float); always above 0."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read `20ep`, `20 ep`, `500step`, `1.5h`. Raises ValueError that names the units."""
        if isinstance(text, Duration):
            return text
        match = _PATTERN.fullmatch(str(text)) if isinstance(text, int | float | str) else None
        try:
            number, unit = match.groups() if match is not None else ("", "")
            value = float(number)
        except ValueError:
            raise ValueError(f"expected a number and a unit, like 20ep, 500step or 10min, found {text!r}") from None
        if not unit:
            raise ValueError(f"{text} of what? Write a unit after the number: {UNITS}; for example {number}ep")
        if unit not in ("ep", "step", *_SECONDS):
            raise ValueError(f"unknown unit {unit!r} in {text!r}; the units are {UNITS}")
        if not 0 < value < float("inf"):
            raise ValueError(f"a duration must be above 0, found {text!r}")
        if unit in _SECONDS:
            return cls(value * _SECONDS[unit], "s")
        if value != int(value):
            raise ValueError(f"{unit} counts whole {'epochs' if unit == 'ep' else 'steps'}, found {text!r}")
        return cls(int(value), unit)

    @classmethod
    def parse_time(cls, text: object) -> Duration:
        """The same for a key that is a time."""
        if not (length := cls.parse(text)).is_time:
            raise ValueError(f"expected a time like 10min, found {length}")
        return length

    @classmethod
    def parse_count(cls, text: object) -> Duration:
        """The same for a key that counts epochs or steps."""
        if (length := cls.parse(text)).is_time:
            raise ValueError(f"expected epochs or steps, like 5ep or 500step, found {length}")
        return length

    @property
    def is_time(self) -> bool:
        """Whether it is measured by the clock, in seconds."""
        return self.unit == "s"

    def __str__(self) -> str:
        """The shortest exact spelling: parses back to an equal Duration."""
        if self.is_time:
            for unit in ("h", "min"):
                amount, rest = divmod(self.value, _SECONDS[unit])
                if amount and not rest:
                    return f"{int(amount)}{unit}"
        value = int(self.value) if self.value == int(self.value) else self.value
        return f"{value!r}{self.unit}"
