"""`predict`: predictions of a dataset, with or without labels, by a run's checkpoint, as a CSV table."""

from __future__ import annotations

import contextlib
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from dist_train.commands.arguments import CHECKPOINT, SPLIT, output, parse_run, writable
from dist_train.config.errors import visible
from dist_train.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.training.evaluate import Meaning, Predicted


def main(arguments: Sequence[str]) -> int:
    """Write one row per sample in dataset order: the same bytes on any number of processes."""
    table_file = output("FILE.csv", "where to write; by default the table is printed")
    options = parse_run("predict", __doc__, arguments, CHECKPOINT, SPLIT, table_file)
    from dist_train.run.open import open_run
    from dist_train.training.evaluate import gathered, read_meaning

    with open_run(options.run, options.checkpoint, options.overrides) as restored:
        split = restored.split(options.split)
        loader = restored.loader(split)
        table: Table | None = None
        with _opened(options.output if restored.world.is_main else None) as file:
            writer = csv.writer(file, lineterminator="\n")
            for part in gathered(restored.evaluator, loader):
                header = table is None
                table = table or Table(read_meaning(restored.evaluator, part.outputs), loader.dataset)
                columns = table.columns(part)
                writer.writerows([columns] if header else [])
                writer.writerows(zip(*columns.values(), strict=True))
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
        except BrokenPipeError:  # the reader closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    with replacing(writable(output)) as path, open(path, "w", newline="", encoding="utf-8") as file:
        yield file


class Table:
    """index, prediction, probabilities or further values, target: class numbers with the names of the classes beside them."""

    def __init__(self, meaning: Meaning, dataset: Any):
        from dist_train.data.reading import attribute_of

        self.meaning = meaning
        self.classes = [visible(str(name), keep="") for name in attribute_of(dataset, "classes") or []]
        self.named = [visible(str(name), keep="") for name in attribute_of(dataset, "targets_named") or []]
        self.original = attribute_of(dataset, "original_units")

    def columns(self, part: Predicted) -> dict[str, Sequence[Any]]:
        """The columns of consecutive samples, by name."""
        columns: dict[str, Sequence[Any]] = {"index": range(part.start, part.start + len(part.outputs))}
        columns |= self._answers("prediction", self.meaning.predictions(part.outputs))
        if self.meaning.kind in ("classes", "binary"):
            likely = _texts(self.meaning.probabilities(part.outputs))
            names = [f"probability_{k}" for k in range(len(likely))] if len(likely) > 1 else ["probability"]
            columns |= dict(zip(names, likely))
        if part.targets is not None:
            columns |= self._answers("target", self.meaning.truths(part.targets))
        return columns

    def _answers(self, word: str, values: Tensor) -> dict[str, Sequence[Any]]:
        if self.meaning.kind == "values":
            texts = _texts(self.original(values) if self.original is not None else values)
            if values.dim() == 1:
                return {word: texts[0]}
            names = self.named if self.named and len(self.named) == len(texts) else range(len(texts))
            return {f"{word}_{name}": column for name, column in zip(names, texts, strict=True)}
        numbers = values.tolist()
        if not self.classes:
            return {word: numbers}
        names = [self.classes[k] if 0 <= k < len(self.classes) else "" for k in numbers]
        return {word: numbers, f"{word}_name": names}


def _texts(values: Tensor) -> list[list[str]]:
    """Each column's numbers, in the fewest digits that read back bitwise identical."""
    array = values.numpy()
    return [[str(value) for value in column] for column in (array.T if array.ndim == 2 else [array])]
