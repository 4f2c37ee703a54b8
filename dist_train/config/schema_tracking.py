"""The keys of `tracking` and `debug`: see `schema.py`."""

from __future__ import annotations

from typing import Literal

from . import fields
from .fields import Count, Duration, Length, Section, Text, about, harmless


class ProfileConfig(Section):
    """A trace of some steps by torch.profiler, in profile/ of the run: rank 0's Python calls, operators and GPU kernels."""

    steps: list[Count] = harmless(
        ...,
        "The first and the last step of the run, as rows count them: [100, 110]. A start in the middle traces the rest.",
    )


class WandbConfig(Section):
    """Weights & Biases, by rank 0, from a separate process: if it fails or hangs, the run continues with a warning."""

    project: Text = harmless(..., "The project of the run.")
    mode: Literal["online", "offline", "disabled"] = harmless(
        "online", "`offline` writes files for `wandb sync`; `disabled` writes nothing."
    )
    entity: Text | None = harmless(None, "The user or team; null: the one that is logged in.")
    group: Text | None = harmless(None, "A name that groups runs.")
    tags: list[Text] = harmless([], "Tags of the run.")


class ImagesConfig(Section):
    """Images in TensorBoard: batches as the network gets them, and the outputs of its layers."""

    every: Length = harmless(Duration(1, "ep"), "How often; also before training (step 0) and when it is completed.")
    samples: Count = harmless(8, "How many samples are shown: the first of rank 0's batch.")
    modules: fields.Patterns = harmless(
        [],
        "Modules whose outputs are shown too: patterns of their names (`conv1`, `features.*`) or classes (`ReLU`). The "
        "channels of a sample are a grid of gray images, each from its minimum (black) to its maximum (white).",
    )


class TrackingConfig(Section):
    """Views of metrics.jsonl, which is always written."""

    tensorboard: bool = harmless(True, "Write TensorBoard files.")
    images: ImagesConfig | None = harmless(None, about(ImagesConfig))
    histograms: Length | None = harmless(
        None,
        "How often TensorBoard gets histograms of the trained weights, and of their gradients as the optimizer gets them; "
        "also before training (step 0). null: never.",
    )
    graph: bool = harmless(False, "Show TensorBoard the model's graph (torch.jit.trace, on a copy), before training.")
    wandb: WandbConfig | None = harmless(None, about(WandbConfig))
    report: bool = harmless(
        True,
        "Write curves.png and report.html when a start ends or stops, with pictures by the kept model when the run is completed "
        "(the command `report` writes both later, and so does a start of a completed run without a report).",
    )


class DebugConfig(Section):
    """Diagnostics."""

    trace_samples: bool = harmless(False, "Write the sample indices of every step to trace/, before its backward.")
    digest: bool = harmless(
        False,
        "Record a digest of every step's loss, reduced gradient and weights, of each tensor on each rank, in digest/: by them "
        "`dist-train compare RUN RUN` finds the first step and tensor at which two runs part.",
    )
    layers: bool = harmless(
        False, "Show every layer of the model at the start: class, output shape, parameters, operations."
    )
