"""`make docs`: generates the tables of docs/config.md and dist_train/config/schema.json from the schema of the config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_schema import to_text

from dist_train.config import load
from dist_train.config.fields import Section, about, section_of, walk
from dist_train.config.schema import Config

SCHEMA_FILE = Path(load.__file__).with_name("schema.json")
REFERENCE_FILE = Path(__file__).with_name("config.md")
# Above this line, docs/config.md is written by hand.
MARK = "<!-- From here on generated from the schema by `make docs`; a test keeps it current. -->\n"


def reference() -> str:
    """docs/config.md: its hand-written part, then a table for each section."""
    parts = [REFERENCE_FILE.read_text(encoding="utf-8").partition(MARK)[0] + MARK, "## Top level", ""]
    parts += [*_table(Config, ""), ""]
    for name, field in walk(Config):
        section = section_of(field)
        if section is not None:
            parts += [f"## {name}", "", about(section), "", *_table(section, name + "."), ""]
    parts += ["## Names from other tools", "", "| name elsewhere | here |", "| --- | --- |"]
    answers: dict[str, list[str]] = {}
    for name, answer in load.foreign()[0].items():
        answers.setdefault(load.example_of(answer), []).append(f"`{name}`")
    parts += [f"| {', '.join(names)} | {answer} |" for answer, names in answers.items()]
    return "\n".join(parts) + "\n"


def _table(section: type[Section], above: str) -> Iterator[str]:
    yield "| key | value | default | change | |"
    yield "| --- | --- | --- | --- | --- |"
    for name, schema in section.model_json_schema()["properties"].items():
        if "change" in schema:  # the rest are sections of their own
            shown = "`" + json.dumps(schema["default"]).replace('"', "") + "`" if "default" in schema else "required"
            yield f"| `{above}{name}` | {_kind(schema)} | {shown} | {schema['change']} | {_prose(schema['description'])} |"


def _prose(text: str) -> str:
    """A description as Markdown: what looks like emphasis outside of code isn't."""
    code = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_])", r"\\\1", part) for part in code)


def _kind(schema: dict[str, Any]) -> str:
    """A JSON Schema in a few words: `integer >= 1 or auto`."""
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(schema.get("enum", [schema.get("const")]))
    if "pattern" in schema:
        return "duration"
    if schema.get("type") in (None, "object"):
        return "component" if "required" in schema else "mapping"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    limits = " and".join(f" {sign} {schema[limit]}" for limit, sign in signs.items() if limit in schema)
    return f"list of: {_kind(schema['items'])}" if schema["type"] == "array" else str(schema["type"]) + limits


def main() -> None:
    """Write both files."""
    SCHEMA_FILE.write_text(to_text(), encoding="utf-8")
    REFERENCE_FILE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
