"""`evaluate`: metrics of a run's checkpoint on its data, or on other data, with the EMA weights where it has them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from dist_train.commands.arguments import CHECKPOINT, SPLIT, output, parse_run, writable
from dist_train.commands.usage import Usage, help_width
from dist_train.files import replacing

USAGE = Usage(
    "evaluate",
    "Metrics of a run's checkpoint on its data, or on other data, with the EMA weights where it has them. On a terminal they "
    "are a table; into a pipe or a file the same follows as a last line of JSON.",
    """\
dist-train evaluate runs/digits
dist-train evaluate runs/digits --checkpoint last --split val --json
dist-train evaluate runs/table data.test.path=other.csv""",
    (
        CHECKPOINT,
        SPLIT,
        ("--json", {"action": "store_true", "help": "print JSON and nothing else"}),
        output("FILE.json", "write the JSON there too"),
    ),
    takes="run and keys",
)


def main(arguments: Sequence[str]) -> int:
    """Print a table, JSON, or where nobody sees a table, both; every sample counts once, on any number of processes."""
    options = parse_run(USAGE, arguments)
    from dist_train.run.open import open_run
    from dist_train.text import format_number, two_columns
    from dist_train.tracking.records import finite

    with open_run(options.run, options.checkpoint, options.overrides) as restored:
        split = restored.split(options.split)
        metrics = restored.evaluator.run(restored.loader(split))
        if not restored.world.is_main:
            return 0
        found = restored.found
        facts = {"run": restored.run.location, "checkpoint": found.name, "split": split}
        line = json.dumps({**facts, "step": found.step, "ema": "ema" in found.parts, "metrics": finite(metrics)})
        if not options.json:
            numbers = {name: format_number(name, value) for name, value in metrics.items()}
            print(*two_columns([*facts.items(), *numbers.items()], help_width()), sep="\n")
        if options.json or not sys.stdout.isatty():  # scripts have read the last line before there was --json
            print(line)
        sys.stdout.flush()
        if options.output is not None:
            with replacing(writable(options.output)) as path:
                path.write_text(line + "\n", encoding="utf-8")
    return 0
