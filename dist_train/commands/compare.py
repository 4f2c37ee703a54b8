"""`compare`: whether two runs are bitwise identical, else the first step and the first tensor at which they part."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.commands.arguments import parse
from dist_train.commands.usage import Usage

_RUN = {"metavar": "RUN", "help": "a run's directory or URL"}
USAGE = Usage(
    "compare",
    "Whether two runs are bitwise identical, else the first step and the first tensor at which they part. Train both with "
    "debug.digest=true, which records a digest of every step's loss, reduced gradient and weights on each rank; without it the "
    "rows of metrics.jsonl, the checkpoints and the final weights are compared. The exit code is 0 only if everything is equal "
    "and both ended in the same way at the same step, 1 if not, 2 if there is nothing to compare.",
    "dist-train compare runs/one runs/four",
    (("one", _RUN), ("other", _RUN)),
)


def main(arguments: Sequence[str]) -> int:
    """Print whether two runs are equal, or where they part; 0 only if they are equal."""
    options = parse(USAGE, arguments)
    from dist_train.views.compare import compare_runs

    verdict = compare_runs(options.one, options.other)
    print("\n".join(verdict.lines))
    return 0 if verdict.equal else 1
