"""What goes wrong with data, told with the file or the sample that it happened at."""

from __future__ import annotations

import traceback
from typing import Any


class DataError(ValueError):
    """A dataset, a data file or a combination of data settings that cannot be used."""


class SampleError(RuntimeError):
    """Reading or collating one sample failed; the user's own exception and traceback are the cause."""


def dataset_name(dataset: Any) -> str:
    """The class of a dataset as it is written in a config."""
    kind = type(dataset)
    return kind.__qualname__ if kind.__module__ == "__main__" else f"{kind.__module__}.{kind.__qualname__}"


def told(error: BaseException) -> str:
    """The error in one line with the user's own place: the innermost frame of its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {error}{place}"
