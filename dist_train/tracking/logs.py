"""Python logging: one logger "dist_train", one file per rank, with the warnings of every library in it."""

from __future__ import annotations

import logging
import logging.handlers
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from dist_train.config.errors import mask, visible
from dist_train.files import retried

NAMES = ("dist_train", "py.warnings")  # the second is where logging.captureWarnings sends Python's warnings
EARLY = 1000  # records buffered until the log file's path is known


class _File(logging.FileHandler):
    def format(self, record: logging.LogRecord) -> str:
        return visible(mask(super().format(record)))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        """Print no traceback for every line on a full disk: the failure of the checkpoint reports it."""


class _Shown(logging.Handler):
    """Shows warnings logged anywhere on rank 0's terminal, unless the console has printed them itself."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "shown", False):
            self._show(record.getMessage().strip())


class Capture:
    """Captures log records and Python warnings of this process, from its creation until `close`.

    Args:
        show: called with the text of each warning (rank 0's terminal); None: warnings go to the log file only.
    """

    def __init__(self, show: Callable[[str], None] | None) -> None:
        self._format = warnings.formatwarning
        warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
            f"{filename}:{lineno}: {category.__name__}: {message}"
        )
        logging.captureWarnings(True)
        self._handlers: list[logging.Handler] = [logging.handlers.MemoryHandler(EARLY, logging.CRITICAL + 1)]
        if show is not None:
            self._handlers.append(_Shown(show))
        for name in NAMES:
            log = logging.getLogger(name)
            log.setLevel(logging.INFO)
            log.propagate = False
            for handler in self._handlers:
                log.addHandler(handler)

    def close(self) -> None:
        """Restore Python's warnings and both loggers; a second call does nothing."""
        if not self._handlers:
            return
        self._handlers = []
        logging.captureWarnings(False)
        warnings.formatwarning = self._format
        for name in NAMES:
            log = logging.getLogger(name)
            log.propagate = True
            for handler in list(log.handlers):
                log.removeHandler(handler)
                handler.close()


def setup_logging(path: str | os.PathLike[str], rank: int) -> None:
    """Send the logger "dist_train" and Python's warnings to `path` (logs/rank-N.log), appending.

    What was logged before the path was known is written first. Called again (a notebook that trains twice), it switches
    to the new file.

    Raises:
        StorageError: the file can't be opened.
    """
    retried("create the directory of", path, lambda: Path(path).parent.mkdir(parents=True, exist_ok=True))
    file = retried("open", path, lambda: _File(path, mode="a", encoding="utf-8", errors="backslashreplace"))
    form = logging.Formatter(f"%(asctime)s.%(msecs)03dZ rank {rank} %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    file.setFormatter(form)
    for name in NAMES:
        log = logging.getLogger(name)
        log.setLevel(logging.INFO)
        for handler in list(log.handlers):
            if isinstance(handler, logging.handlers.MemoryHandler):
                handler.setTarget(file)
                handler.flush()
            if isinstance(handler, logging.handlers.MemoryHandler | _File):
                log.removeHandler(handler)
        log.addHandler(file)
