"""`python -m dist_train.config.docs` writes docs/config.md and dist_train/config/schema.json from the schema."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .fields import Section, plain, says, section_of
from .foreign import FOREIGN, example_of
from .schema import Config

ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILE = Path(__file__).with_name("schema.json")
REFERENCE_FILE = ROOT / "docs" / "config.md"

HEAD = """# The config, key by key

This page is generated from the schema by `python -m dist_train.config.docs`; a test keeps it current.
`python -m dist_train.main config --config FILE` prints a config with every default filled in.

A config is one YAML file (read by the rules of YAML 1.2: `1e-3` is a number, `off` is a string), and then what stands
on the command line as `key.path=value`, with list entries by number: `data.augment.0.pixels=2`. A config names code
that is run: treat one from a stranger like a program from a stranger.

With the first line of the files in `configs/`, editors that know yaml-language-server complete and check the keys.

## Components

`_target_` is the import path of a class or function, its arguments stand beside it; `_args_` is for positional ones.
Arguments may be components themselves, and lists become tensors where the signature wants a tensor:

```yaml
model: {_target_: my_models.Net, width: 128}         # my_models.py beside the config, or in the working directory
loss: {_target_: torch.nn.CrossEntropyLoss, weight: [1.0, 2.0, 1.0]}
optimizer: {_target_: torch.optim.AdamW, lr: 1e-3}    # the engine gives the parameters
scheduler: {_target_: torch.optim.lr_scheduler.OneCycleLR, max_lr: 0.1, total_steps: total_steps}
```

Code is looked for beside the config file, in the working directory, then among what is installed. Everything is checked
before anything starts: that it can be imported, that the arguments fit its signature, that it is what its place needs.

## extends

`extends: base.yaml` (or a list, later ones win), relative to the file that says so, merges deeply: mappings key by key,
all else is replaced. A component with another `_target_` replaces the inherited one with all of its arguments; `null`
takes something away. An override on the command line replaces what stands at its key.

## Durations

A number and its unit: `20ep` (epochs), `500step` (optimizer steps), `90s`, `10min`, `2h` (time, over all starts).

## Changing a config and running again

Each key below is of one kind. *harmless*: taken, and the difference logged. *consent*: refused with the difference,
unless `checkpoint.accept_changes=true` (or another `run.name`). *refused*: the run can't go on with it.
"""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors: draft 2020-12, with every key described."""
    schema = Config.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "dist_train config"}
    schema["properties"] = {
        "extends": {
            "description": "A config file, or several, that this one is merged over; relative to this file.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        **schema["properties"],
    }
    # With `extends`, everything may stand in the base; what is missing in the end is found when the config is read.
    for part in (schema, schema["$defs"]["DataConfig"]):
        part.pop("required", None)
    # Short forms, which the validators of these two fields write out.
    schema["$defs"]["TransferConfig"]["properties"]["head"]["anyOf"].append({"type": "integer", "minimum": 1})
    transfer = schema["properties"]["transfer"]
    transfer["anyOf"] = [{"$ref": transfer.pop("$ref")}, {"type": "null"}]
    result: dict[str, Any] = _tidy(schema)
    return result


def _tidy(value: Any) -> Any:
    """Without pydantic's titles and our own marks, which editors would only show as noise."""
    if isinstance(value, dict):
        kept = {
            key: item for key, item in value.items() if key != "change" and not (key == "title" and "type" in value)
        }
        return {key: _tidy(item) for key, item in kept.items()}
    return [_tidy(item) for item in value] if isinstance(value, list) else value


def reference() -> str:
    """docs/config.md."""
    parts = [HEAD.rstrip(), "", "## Top level", "", *_table(Config, ""), ""]
    for name, section in _sections(Config, ""):
        parts += [f"## {name}", "", inspect.cleandoc(section.__doc__ or ""), "", *_table(section, name + "."), ""]
    parts += ["## Names from elsewhere", "", "| you may know it as | here |", "| --- | --- |"]
    answers: dict[str, list[str]] = {}
    for name, answer in FOREIGN.items():
        answers.setdefault(example_of(answer), []).append(name)
    parts += [f"| {', '.join(f'`{name}`' for name in names)} | {answer} |" for answer, names in answers.items()]
    return "\n".join(parts) + "\n"


def _sections(section: type[Section], above: str) -> Iterator[tuple[str, type[Section]]]:
    for name, known in section.model_fields.items():
        inner = section_of(known.annotation)
        if inner is not None:
            yield above + name, inner
            yield from _sections(inner, f"{above}{name}.")


def _table(section: type[Section], above: str) -> Iterator[str]:
    yield "| key | value | default | change | |"
    yield "| --- | --- | --- | --- | --- |"
    for name, known in section.model_fields.items():
        if section_of(known.annotation) is not None and section is Config:
            continue
        default = (
            "needed" if known.is_required() else f"`{_shown(plain(known.get_default(call_default_factory=True)))}`"
        )
        extra = known.json_schema_extra
        change = extra["change"] if isinstance(extra, dict) else ""
        kind = says(known.rebuild_annotation()).replace("|", "\\|")
        yield f"| `{above}{name}` | {kind} | {default} | {change} | {known.description} |"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace('"', "")


def main() -> None:
    """Write both files."""
    SCHEMA_FILE.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
    REFERENCE_FILE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
