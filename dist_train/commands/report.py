"""`report`: write a run's report.html again, or compare several runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_train.commands.arguments import CHECKPOINT, command_error, output, parse_run, writable
from dist_train.commands.usage import Usage
from dist_train.config.errors import ConfigError
from dist_train.files import replacing

USAGE = Usage(
    "report",
    "Write a run's report.html again, or compare several runs in one page.",
    """\
dist-train report runs/digits
dist-train report runs/one runs/two --output comparison.html""",
    (CHECKPOINT, output("FILE.html", "of a comparison; by default comparison.html, in this directory")),
    takes="runs and keys",
)


def main(arguments: Sequence[str]) -> int:
    """One run: its report, with pictures by the kept model. Several: one page with all of them."""
    options = parse_run(USAGE, arguments)
    wrong = ""
    if len(options.runs) > 1 and (options.checkpoint is not None or options.overrides):
        wrong = "a comparison reads records only: it takes no --checkpoint and no keys of a config"
    elif len(options.runs) == 1 and options.output is not None:
        wrong = "--output is for a comparison; the report of one run is the report.html in its directory"
    if wrong:
        raise command_error("report", wrong)
    from dist_train.run.given import check_given
    from dist_train.runtime.launch import read_placement
    from dist_train.runtime.storage import open_storage

    is_main = read_placement(os.environ).rank == 0
    if len(options.runs) > 1:
        if is_main:
            compare(options.runs, options.output or "comparison.html")
        return 0
    storage = open_storage(options.run)
    if options.checkpoint or options.overrides or not storage.exists("config.yaml"):
        check_given(options.run, options.checkpoint, options.overrides)
    if storage.exists("config.yaml") and not (options.checkpoint or options.overrides or storage.list("checkpoints")):
        path = report_records(options.run) if is_main else None
    else:
        from dist_train.run.report import report_again

        path = report_again(options.run, options.checkpoint, options.overrides)
    if path is not None:
        print(path)
    return int(path is None and is_main)  # it couldn't be written, which was reported


def report_records(location: str) -> Path | None:
    """The report of a run that holds no model: from its records, which takes no torch."""
    from dist_train.pages.page import write_records
    from dist_train.runtime.rundir import RunDir
    from dist_train.runtime.sidefiles import problems

    run = RunDir(location)
    missing = f"the report has no pictures: {run.location} holds no checkpoint"
    for line in (*(f"{name} can't be read: {wrong}" for name, wrong in problems(run.storage)), missing):
        print(f"warning: {line}", file=sys.stderr)
    return write_records(run, lambda line: print(f"warning: {line}", file=sys.stderr))


def compare(runs: Sequence[str], path: str) -> None:
    """Overlaid curves, results, and the keys in which the configs differ; reads files only."""
    from dist_train.pages.comparison import write_comparison
    from dist_train.runtime.rundir import RunDir
    from dist_train.runtime.sidefiles import problems

    opened = [RunDir(location) for location in runs]
    for run in opened:
        if not run.storage.exists("config.yaml"):
            raise ConfigError.single("--run", f"{run.location} is not a run's directory: it has no config.yaml")
        for name, wrong in problems(run.storage):
            print(f"warning: {run.location}/{name} can't be read: {wrong}", file=sys.stderr)
    with replacing(writable(path)) as part:
        write_comparison([run.records() for run in opened], part)
    print(path)
