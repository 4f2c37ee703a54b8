"""`config`: print a config with everything resolved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from dist_train.commands.arguments import parse
from dist_train.commands.usage import Usage
from dist_train.config.errors import ConfigError, did_you_mean

USAGE = Usage(
    "config",
    "Print a config with every default filled in, one value of it, or the JSON Schema of configs.",
    """\
dist-train config config.yaml
dist-train config config.yaml --get run.path""",
    (
        ("--get", {"metavar": "KEY", "help": "print one value; run.path is where the run is written"}),
        ("--schema", {"action": "store_true", "help": "print the JSON Schema of configs, for editors"}),
    ),
    takes="config",
)


def main(arguments: Sequence[str]) -> int:
    """Print the resolved config, one value of it, or the schema."""
    options = parse(USAGE, arguments)
    if options.schema:
        schema_file = files("dist_train.config") / "schema.json"
        print(json.dumps(json.loads(schema_file.read_text(encoding="utf-8")), indent=2))
        return 0
    from dist_train.config.load import load_config

    config = load_config(options.config, options.overrides)
    if options.get is None:
        print(config.to_yaml(), end="")
    elif options.get == "run.path":
        from dist_train.runtime.location import run_location

        print(run_location(config))
    else:
        try:
            value = config.get(options.get)
        except KeyError:
            guess = did_you_mean(options.get, ["run.path"])
            raise ConfigError.single("--get", f"there is no key {options.get!r}{guess}") from None
        print(value if isinstance(value, str) else json.dumps(value))
    return 0
