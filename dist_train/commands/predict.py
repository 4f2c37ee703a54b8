"""`predict`: what a run's checkpoint says about each sample, as a table in a file."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from dist_train.commands.arguments import Parser, add_split, whole_file, with_run

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.engine.predict import Meaning, Predicted


def main(arguments: Sequence[str]) -> int:
    """Write a row a sample in dataset order: the same bytes on any number of processes."""
    parser = Parser("predict", "Predictions of a dataset, with or without labels, as a CSV table.")
    add_split(parser)
    parser.add_argument("--output", metavar="FILE.csv", help="where to write; by default the table is printed")
    options = with_run(parser, arguments)
    from dist_train.engine.predict import gathered, read_meaning
    from dist_train.engine.restore import attribute_of, open_run

    with open_run(options.run, options.checkpoint, options.overrides) as restored:
        split = restored.split(options.split)
        loader = restored.loader(split)
        table: Table | None = None
        with _opened(options.output if restored.world.is_main else None) as file:
            for part in gathered(restored.evaluator, loader):
                if table is None:
                    meaning = read_meaning(restored.evaluator, part.outputs, part.targets)
                    table = Table(file, loader.dataset, meaning, attribute_of)
                    table.head(part)
                table.rows(part)
        if table is not None and options.output is not None:
            name, count = restored.found.name, loader.plan.length
            print(f"{options.output}: {count:,} predictions of {split} by {name} of {restored.run.location}")
    return 0


@contextlib.contextmanager
def _opened(output: str | None) -> Iterator[TextIO]:
    if output is None:
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    with whole_file(output) as path, open(path, "w", newline="", encoding="utf-8") as file:
        yield file


class Table:
    """index, prediction, probabilities or further values, target: numbers of classes with their names beside them."""

    def __init__(self, file: TextIO, dataset: Any, meaning: Meaning, attribute_of: Any):
        self.meaning = meaning
        self.classes = [str(name) for name in attribute_of(dataset, "classes") or []]
        self.named = attribute_of(dataset, "targets_named")
        self.original = attribute_of(dataset, "original_units") if meaning.kind == "values" else None
        self._writer = csv.writer(file, lineterminator="\n")

    def head(self, part: Predicted) -> None:
        """The names of the columns."""
        columns = ["index", *self._columns("prediction", part.outputs)]
        if self.meaning.kind == "classes":
            columns += [f"probability_{k}" for k in range(part.outputs.shape[1])]
        elif self.meaning.kind == "binary":
            columns.append("probability")
        self._writer.writerow(columns + (self._columns("target", part.targets) if part.targets is not None else []))

    def _columns(self, word: str, values: Tensor) -> list[str]:
        if self.meaning.kind != "values":
            return [word, f"{word}_name"] if self.classes else [word]
        if values.dim() == 1:
            return [word]
        names = self.named if self.named and len(self.named) == values.shape[1] else range(values.shape[1])
        return [f"{word}_{name}" for name in names]

    def rows(self, part: Predicted) -> None:
        """A row for each sample of a stretch of the dataset."""
        columns = self._cells(part.outputs)
        if self.meaning.kind in ("classes", "binary"):
            columns += _texts(self.meaning.probabilities(part.outputs))
        if part.targets is not None:
            columns += self._cells(part.targets, truth=True)
        indices = range(part.start, part.start + len(part.outputs))
        self._writer.writerows(zip(indices, *columns, strict=True))

    def _cells(self, values: Tensor, truth: bool = False) -> list[list[Any]]:
        """The columns of a prediction or a target, a list each."""
        if self.meaning.kind == "values":
            values = self.meaning.truths(values) if truth else self.meaning.probabilities(values)
            return _texts(self.original(values) if self.original is not None else values)
        numbers = (self.meaning.truths(values) if truth else self.meaning.predictions(values)).tolist()
        names = [self.classes[k] if 0 <= k < len(self.classes) else "" for k in numbers]
        return [numbers, names] if self.classes else [numbers]


def _texts(values: Tensor) -> list[list[str]]:
    """Each column's numbers in the fewest digits that read back to the same bits."""
    array = values.numpy()
    return [[str(value) for value in column] for column in (array.T if array.ndim == 2 else [array])]
