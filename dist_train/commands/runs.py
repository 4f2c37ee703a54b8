"""`runs`: the runs below a directory or URL, how each one is, and where their configs differ."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence

from dist_train.commands.arguments import parse
from dist_train.commands.usage import Usage
from dist_train.config.errors import ConfigError

USAGE = Usage(
    "runs",
    "The runs below a directory or URL, how each one is, and where their configs differ.",
    "dist-train runs",
    (
        ("dir", {"nargs": "?", "default": "runs", "metavar": "DIR", "help": "by default runs"}),
        ("--json", {"action": "store_true", "help": "print JSON"}),
        ("--watch", {"action": "store_true", "help": "update every two seconds, until Ctrl-C"}),
    ),
)
PAUSE = 2.0  # seconds between two updates with --watch, at least


def main(arguments: Sequence[str]) -> int:
    """Print a table of runs and one of the keys in which they differ, or both as JSON; with --watch repeatedly."""
    options = parse(USAGE, arguments)
    from dist_train.runtime.storage import open_storage
    from dist_train.views.runs import runs_page

    root = open_storage(options.dir)
    if root.is_local and not os.path.isdir(root.location):
        raise ConfigError.single("DIR", f"expected a directory with runs, found no directory {options.dir}")
    if not options.watch:
        print(runs_page(root, options.json))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            began = time.monotonic()
            page = runs_page(root, options.json)
            print("\x1b[H\x1b[2J" + page if sys.stdout.isatty() else page + "\n", flush=True)
            # Five times the reading spares a store with many runs.
            time.sleep(max(PAUSE, 5 * (time.monotonic() - began)))
    return 0
