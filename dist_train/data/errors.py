"""What goes wrong with data, told with the file or the sample that it happened at."""

from __future__ import annotations


class DataError(ValueError):
    """A dataset, a data file or a combination of data settings that cannot be used."""


class SampleError(RuntimeError):
    """Reading or collating one sample failed; the user's own exception and traceback are the cause."""
