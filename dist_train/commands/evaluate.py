"""`evaluate`: the figures of a run's checkpoint on its data, or on other data."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dist_train.commands.arguments import Parser, add_split, whole_file, with_run


def main(arguments: Sequence[str]) -> int:
    """Print a table and, as the last line, the same as JSON; every sample counts once, on any number of processes."""
    parser = Parser("evaluate", "Metrics of a run's checkpoint, with the average of the weights where it has one.")
    add_split(parser)
    parser.add_argument("--output", metavar="FILE.json", help="write the JSON there too")
    options = with_run(parser, arguments)
    from dist_train.run.open import open_run
    from dist_train.text import format_number, two_columns
    from dist_train.tracking.records import finite

    with open_run(options.run, options.checkpoint, options.overrides) as restored:
        split = restored.split(options.split)
        figures = restored.evaluator.run(restored.loader(split))
        if not restored.world.is_main:
            return 0
        found = restored.found
        said = {"run": restored.run.location, "checkpoint": found.name, "split": split}
        numbers = {name: format_number(name, value) for name, value in figures.items()}
        line = json.dumps({**said, "step": found.step, "ema": "ema" in found.parts, "metrics": finite(figures)})
        print(*two_columns([*said.items(), *numbers.items()]), line, sep="\n", flush=True)
        if options.output is not None:
            with whole_file(options.output) as path:
                path.write_text(line + "\n", encoding="utf-8")
    return 0
