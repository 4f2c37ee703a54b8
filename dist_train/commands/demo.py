"""`demo`: train the built-in example."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.commands import train
from dist_train.commands.usage import Usage

USAGE = Usage(
    "demo",
    "Train the built-in example: a small convolutional network on 1,797 handwritten digits that come with scikit-learn, in "
    "runs/digits. It takes less than a minute on a CPU, and needs no network. Any key of its config can be changed.",
    """\
dist-train demo
dist-train demo trainer.duration=3ep run.name=short
dist-train config > digits.yaml             # its config, to begin from""",
    takes="keys",
)


def main(arguments: Sequence[str]) -> int:
    """As `train` without a config."""
    return train.main(arguments, USAGE)


def is_answered(arguments: Sequence[str]) -> bool:
    """As `train` without a config."""
    return train.is_answered(arguments, USAGE)
