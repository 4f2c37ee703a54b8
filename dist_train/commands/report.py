"""`report`: a run's report.html once more, or several runs laid over each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from dist_train.commands.arguments import Parser, whole_file, with_run


def main(arguments: Sequence[str]) -> int:
    """One run: its report, with pictures by the model that is kept. Several: one page with all of them."""
    parser = Parser("report", "Write a run's report.html again, or compare several runs.")
    parser.add_argument("--output", metavar="FILE.html", help="of a comparison; by default comparison.html, here")
    options = with_run(parser, arguments, several=True)
    if len(options.runs) > 1:
        if options.checkpoint is not None or options.overrides:
            parser.error("a comparison reads records only: it takes no --checkpoint and no keys of a config")
        return compare(options.runs, options.output or "comparison.html")
    if options.output is not None:
        parser.error("--output is for a comparison; the report of one run is the report.html in its directory")
    from dist_train.run.report import report_again
    from dist_train.runtime.launch import read_placement

    path = report_again(options.run, options.checkpoint, options.overrides)
    if path is None:
        return int(read_placement(os.environ).rank == 0)  # it couldn't be written, and has said why
    print(path)
    return 0


def compare(runs: Sequence[str], output: str) -> int:
    """Curves over each other, results, and the keys in which the configs differ; reads files only."""
    from dist_train.config.errors import ConfigError
    from dist_train.runtime.launch import read_placement
    from dist_train.runtime.rundir import RunDir
    from dist_train.runtime.sidefiles import problems
    from dist_train.views.report import write_comparison

    if read_placement(os.environ).rank != 0:
        return 0
    opened = [RunDir(location) for location in runs]
    for run in opened:
        if not run.storage.exists("config.yaml"):
            raise ConfigError.single("--run", f"{run.location} holds no run: config.yaml isn't there")
        for name, wrong in problems(run.storage):
            print(f"warning: {run.location}/{name} can't be read: {wrong}", file=sys.stderr)
    with whole_file(output) as path:
        write_comparison([run.records() for run in opened], path)
    print(output)
    return 0
