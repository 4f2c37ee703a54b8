"""`predict`: predictions of a dataset, labeled or not, by a run's checkpoint, as CSV, JSON lines, Parquet or a torch file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_train.commands.arguments import CHECKPOINT, SPLIT, output, parse_run, writable
from dist_train.commands.formats import FORMATS, Format, format_of
from dist_train.commands.usage import Usage
from dist_train.config.errors import ConfigError, visible
from dist_train.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from dist_train.evaluation.evaluate import Evaluator
    from dist_train.evaluation.meaning import Meaning
    from dist_train.evaluation.predict import Column, Predicted

USAGE = Usage(
    "predict",
    "Predictions of a dataset, labeled or not, by a run's checkpoint, in dataset order, as CSV, JSON lines, Parquet or a torch "
    "file.",
    """\
dist-train predict runs/digits --output predictions.csv
dist-train predict runs/table data.test.path=new.csv --format jsonl""",
    (
        CHECKPOINT,
        SPLIT,
        output("FILE", "where to write; by default csv or jsonl is printed"),
        (
            "--format",
            {
                "choices": tuple(FORMATS),
                "help": "by default that of the output's suffix, else csv; parquet and pt need --output",
            },
        ),
        (
            "--raw",
            {
                "action": "store_true",
                "help": "what the task's predict returns as it is, not as classes or in original units",
            },
        ),
    ),
    takes="run and keys",
)


def main(arguments: Sequence[str]) -> int:
    """Write one row per sample in dataset order: the same bytes on any number of processes."""
    options = parse_run(USAGE, arguments)
    form = format_of(options.format, options.output)
    from dist_train.evaluation.meaning import Meaning
    from dist_train.evaluation.predict import gathered
    from dist_train.run.open import open_run

    with open_run(options.run, options.checkpoint, options.overrides) as restored:
        split = restored.split(options.split)
        loader, world = restored.loader(split), restored.world
        table = Table(loader.dataset, options.raw)

        def first(part: Predicted) -> Meaning | None:
            """How all ranks interpret outputs; raises, on all ranks, where they can't be written."""
            meaning = table.meaning(restored.evaluator, part)
            form.encode(table.columns(part, meaning))
            if table.left_out:
                print(f"note: left out, without a row for each sample: {', '.join(table.left_out)}", file=sys.stderr)
            return meaning

        def encoded(part: Predicted, meaning: Sequence[Any] | None) -> Any:
            return form.encode(table.columns(part, None if meaning is None else Meaning(*meaning)))

        with _opened(form, options.output, world.is_main) as write:
            for part in gathered(restored.evaluator, loader, first, encoded, options.raw):
                write(part)
        if world.is_main and options.output is not None:
            name, count = restored.found.name, loader.plan.length
            print(f"{options.output}: {count:,} predictions of {split} by {name} of {restored.run.location}")
    return 0


@contextlib.contextmanager
def _opened(form: Format, output: str | None, is_main: bool) -> Iterator[Callable[[Any], None]]:
    with contextlib.ExitStack() as stack:
        if not is_main:
            yield lambda _: None  # what is gathered is there on rank 0 alone
            return
        path = None if output is None else stack.enter_context(replacing(writable(output)))
        yield stack.enter_context(form.writing(path))


@dataclass
class Table:
    """index, prediction, probabilities or further values, target: class numbers with the names of the classes beside them.

    Outputs of several parts have columns of their own names instead, as all have with `raw`.

    Attributes:
        left_out: parts of the outputs that have no row for each sample.
    """

    dataset: Any
    raw: bool
    left_out: Sequence[str] = ()

    def meaning(self, evaluator: Evaluator, part: Predicted) -> Meaning | None:
        """How one tensor of outputs is to be interpreted; None: not at all."""
        from torch import Tensor

        from dist_train.evaluation.meaning import read_meaning
        from dist_train.task.batch import squeeze_column

        if self.raw or not isinstance(part.outputs, Tensor) or not part.outputs.dim():
            return None
        return read_meaning(evaluator, squeeze_column(part.outputs))

    def columns(self, part: Predicted, meaning: Meaning | None) -> dict[str, Column]:
        """The columns of consecutive samples, by name. Raises ConfigError where the outputs haven't a row per sample."""
        import torch

        from dist_train.evaluation.predict import rows_of

        columns, self.left_out = rows_of(part.outputs, part.samples)
        if meaning is not None:
            columns = self._interpreted(part, meaning)
        targets = {} if meaning is not None and self._is_flat(part) else _targets(part)
        taken = sorted(columns.keys() & {"index", *targets})
        if taken:
            raise ConfigError.single(
                "task",
                f"the outputs have parts named {', '.join(taken)}, as the columns of the dataset are: rename them",
            )
        return {"index": torch.arange(part.start, part.start + part.samples), **columns, **targets}

    def _is_flat(self, part: Predicted) -> bool:
        """Whether outputs and targets are (n,) or (n, k): then targets have the format of predictions."""
        from torch import Tensor

        return part.outputs.dim() <= 2 and isinstance(part.targets, Tensor) and part.targets.dim() in (1, 2)

    def _interpreted(self, part: Predicted, meaning: Meaning) -> dict[str, Column]:
        from dist_train.task.batch import squeeze_column

        outputs = squeeze_column(part.outputs)
        columns = self._answers("prediction", meaning.predictions(outputs), meaning)
        if meaning.kind in ("classes", "binary") and outputs.dim() <= 2:  # of each pixel they would be too many
            columns["probability"] = meaning.probabilities(outputs)
        if self._is_flat(part) and len(part.targets) == part.samples:
            columns |= self._answers("target", meaning.truths(squeeze_column(part.targets)), meaning)
        return columns

    def _answers(self, word: str, values: Tensor, meaning: Meaning) -> dict[str, Column]:
        from dist_train.data.reading import attribute_of

        def names(attribute: str) -> list[str]:
            return [visible(str(name), keep="") for name in attribute_of(self.dataset, attribute) or []]

        if meaning.kind == "values":
            original = attribute_of(self.dataset, "original_units")
            values = values if original is None else original(values)
            named = names("targets_named") if values.dim() == 2 else []
            if len(named) == values.shape[-1]:
                return {f"{word}_{name}": column for name, column in zip(named, values.T, strict=True)}
            return {word: values}
        classes = names("classes")
        if not classes or values.dim() > 1:
            return {word: values}
        return {word: values, f"{word}_name": [classes[k] if 0 <= k < len(classes) else "" for k in values.tolist()]}


def _targets(part: Predicted) -> dict[str, Column]:
    """The targets of a batch, {} where they haven't a row per sample."""
    from dist_train.evaluation.predict import rows_of

    try:
        return {} if part.targets is None else rows_of(part.targets, part.samples, "target", nested=True).columns
    except ConfigError:
        return {}
