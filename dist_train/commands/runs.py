"""`runs`: the runs below a directory or URL, how each one is, and where their configs differ."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import command_error, parse, writable
from dist_train.commands.usage import Usage
from dist_train.config.errors import ConfigError

if TYPE_CHECKING:
    from dist_train.runtime.storage import Storage

USAGE = Usage(
    "runs",
    "The runs below a directory or URL: how each one is, its metrics, and the keys in which their configs differ. A column is "
    "run, state, step, epoch, best, samples/s, age, attempts, reason, a metric (val/loss) or a key of the config "
    "(optimizer.lr, or lr for short).",
    """\
dist-train runs --sort best --where 'lr>0.01' --where state=completed
dist-train runs sweep --columns lr,accuracy,age --seeds
dist-train runs sweep --html runs.html""",
    (
        ("dir", {"nargs": "?", "default": "runs", "metavar": "DIR", "help": "by default runs"}),
        ("--sort", {"metavar": "COLUMN", "help": "sort by it; of a metric the best comes first"}),
        ("--reverse", {"action": "store_true", "help": "the other way round"}),
        ("--columns", {"metavar": "A,B", "help": "the columns to show beside the run"}),
        (
            "--where",
            {
                "action": "append",
                "default": [],
                "metavar": "CONDITION",
                "help": "only runs with lr>0.01, state=completed, run=sweep-*, ...; may be repeated",
            },
        ),
        ("--seeds", {"action": "store_true", "help": "mean and standard deviation of runs that differ in seed alone"}),
        ("--watch", {"action": "store_true", "help": "update every two seconds, until Ctrl-C"}),
        ("--json", {"action": "store_true", "help": "print JSON"}),
        ("--html", {"metavar": "FILE", "help": "write a page that sorts, with the curves of the runs you choose"}),
    ),
)
PAUSE = 2.0  # seconds between two updates with --watch, at least


def main(arguments: Sequence[str]) -> int:
    """Print a table of runs, or the same as JSON or as a page; with --watch repeatedly."""
    options = parse(USAGE, arguments)
    if options.html is not None and (options.watch or options.json):
        raise command_error("runs", "--html writes one page: it takes neither --watch nor --json")
    from dist_train.runtime.storage import open_storage

    root = open_storage(options.dir)
    if root.is_local and not os.path.isdir(root.location):
        raise ConfigError.single("DIR", f"expected a directory with runs, found no directory {options.dir}")
    if options.html is not None:
        from dist_train.listing.runs_page import write_runs

        target = writable(options.html, "--html")
        write_runs(root, *_chosen(root, options), _columns(options), target)
        print(options.html)
    elif not options.watch:
        print(_page(root, options, _width()))
    elif sys.stdout.isatty():
        with _screen() as show:
            _repeat(lambda: show(_page(root, options, _width())))
    else:
        _repeat(lambda: print(_page(root, options, None), end="\n\n", flush=True))
    return 0


def _width() -> int | None:
    """Columns of the terminal; None where the output isn't one."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _chosen(root: Storage, options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """All runs, and the lines of the table as `--where`, `--seeds` and `--sort` want them."""
    from dist_train.listing.entries import entries_of, over_seeds
    from dist_train.listing.runs import find_runs, read_run
    from dist_train.listing.selecting import sorted_by, where

    rows = [read_run(root, name) for name in find_runs(root)]
    entries = entries_of(rows)
    for condition in options.where:
        entries = where(entries, condition)
    if options.seeds:
        entries = over_seeds(entries)
    if options.sort is not None:
        entries = sorted_by(entries, options.sort, options.reverse)
    elif options.reverse:
        entries.reverse()
    return rows, entries


def _page(root: Storage, options: argparse.Namespace, width: int | None) -> str:
    from dist_train.listing.table import as_json, lines_of

    rows, entries = _chosen(root, options)
    if options.json:
        return as_json(rows, entries, options.seeds)
    if not entries:
        return f"{root.location} holds no runs" + (f" with {' and '.join(options.where)}" if rows else "")
    return "\n".join(lines_of(entries, _columns(options), width))


def _columns(options: argparse.Namespace) -> list[str]:
    return [name.strip() for name in (options.columns or "").split(",") if name.strip()]


def _repeat(show: Callable[[], object]) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            began = time.monotonic()
            show()
            # Five times the reading spares a store with many runs.
            time.sleep(max(PAUSE, 5 * (time.monotonic() - began)))


@contextlib.contextmanager
def _screen() -> Iterator[Callable[[str], None]]:
    """The terminal's alternate screen, without a cursor: however it ends, what was there before is there again."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def show(page: str) -> None:
        lines, height = page.split("\n"), shutil.get_terminal_size().lines - 1
        if len(lines) > height:
            lines = [*lines[: height - 1], f"... {len(lines) - height + 1} more lines; --where shows fewer runs"]
        footer = time.strftime(f"%H:%M:%S, every {PAUSE:g} s, Ctrl-C ends")
        sys.stdout.write(
            "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + f"\x1b[J\x1b[2m{footer}\x1b[0m\x1b[K"
        )
        sys.stdout.flush()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        yield show
    finally:
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
        for number, handler in before.items():
            signal.signal(number, handler)
