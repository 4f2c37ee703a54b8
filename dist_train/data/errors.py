"""Errors of datasets and loaders, with the file or the sample that they happened at."""

from __future__ import annotations

import resource
import tempfile
import traceback
from typing import Any

from dist_train.config.errors import error_text


class DataError(ValueError):
    """A dataset, a data file or a combination of data settings that cannot be used."""


class SampleError(RuntimeError):
    """Reading or collating one sample failed; the user's own exception and traceback are the cause."""


class CollateError(SampleError):
    """Samples were read, and can't be made into one batch."""


def dataset_name(dataset: Any) -> str:
    """The class of a dataset as it is written in a config."""
    kind = type(dataset)
    return kind.__qualname__ if kind.__module__ == "__main__" else f"{kind.__module__}.{kind.__qualname__}"


def describe_error(error: BaseException) -> str:
    """The error in one line, with the innermost frame of its traceback: the place in the user's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(error_text(error)[:2000].split())}{place}"


def resource_hint(error: BaseException) -> str:
    """What to do if an error means that a resource for sending batches from workers is exhausted; else ""."""
    text = str(error)
    if "AF_UNIX path too long" in text:
        where = tempfile.gettempdir()
        return (
            f"; sockets are made in the temporary directory, and a socket's path has 107 characters at most, but this "
            f"directory's has {len(where)}: {where}; set TMPDIR=/tmp"
        )
    if "Too many open files" in text or "ancdata" in text:
        return (
            f"; each tensor in flight needs a file descriptor, and this process may open "
            f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: raise the limit (ulimit -n, LimitNOFILE), make fewer tensors "
            f"of a batch (stack them in data.collate), or set a lower data.prefetch_factor"
        )
    if any(sign in text for sign in ("No space left", "shared memory", "Bus error", "Cannot allocate memory")):
        return (
            "; workers send batches through shared memory, which is full (df -h /dev/shm; docker run --shm-size=8g); fewer "
            "data.num_workers or a lower data.prefetch_factor need less of it, data.num_workers=0 none"
        )
    return ""
