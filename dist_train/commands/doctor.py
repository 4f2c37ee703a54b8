"""`doctor`: whether all hosts are ready for a job; launch it on them as the job would be launched."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.commands.arguments import parse, writable
from dist_train.commands.usage import Usage
from dist_train.files import replacing

USAGE = Usage(
    "doctor",
    "Whether all hosts are ready for a job: devices, packages, the network between the ranks, the run's directory, and a dry "
    "run of the config. Launch it as the job will be launched.",
    """\
dist-train doctor config.yaml
torchrun --nproc_per_node=4 -m dist_train.main doctor config.yaml""",
    (
        ("--min-bandwidth", {"type": float, "metavar": "GB/s", "help": "fail below this all-reduce bus bandwidth"}),
        ("--json", {"metavar": "FILE", "help": "write the results as JSON"}),
    ),
    takes="config",
)


def main(arguments: Sequence[str]) -> int:
    """Check everything; 0 if a job may start, 1 if not, 2 if the config is wrong."""
    options = parse(USAGE, arguments)
    from dist_train.doctor.doctor import diagnose

    def write(text: str) -> None:
        if options.json is not None:
            with replacing(writable(options.json, "--json")) as path:
                path.write_text(text, encoding="utf-8")

    return diagnose(options.config, options.overrides, options.min_bandwidth, write)
