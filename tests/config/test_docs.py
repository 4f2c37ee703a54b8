from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from runs import ROOT

sys.path.insert(0, str(ROOT / "docs"))
make_config, make_schema = (importlib.import_module(name) for name in ("make_config", "make_schema"))
SCHEMA_FILE, json_schema = make_config.SCHEMA_FILE, make_schema.json_schema
AGAIN = "run make docs"


def test_the_reference_is_current() -> None:
    assert make_config.REFERENCE_FILE.read_text(encoding="utf-8") == make_config.reference(), AGAIN


def test_the_json_schema_is_current() -> None:
    """With another torch than that of the file, all but what torch names and describes."""
    written, now = json.loads(SCHEMA_FILE.read_text(encoding="utf-8")), json_schema()
    if written["$comment"] != now["$comment"]:
        written, now = without_torch(written), without_torch(now)
    assert written == now, AGAIN
    assert SCHEMA_FILE.stat().st_size < 400_000


def without_torch(schema: dict[str, Any]) -> dict[str, Any]:
    kept = {name: part for name, part in schema["$defs"].items() if not name.startswith("torch.")}
    return {**schema, "$comment": "", "$defs": {name: kept[name] for name in kept if name not in make_schema.KINDS}}


def test_the_configs_point_editors_at_the_schema() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=../dist_train/config/schema.json", path
        assert (path.parent / first.partition("=")[2]).resolve() == SCHEMA_FILE


def test_the_json_schema_describes_every_key_and_closes_every_section() -> None:
    schema = json_schema()
    components = [name for name in schema["$defs"] if "." in name or name in make_schema.KINDS]
    sections = [part for name, part in schema["$defs"].items() if name not in components]
    assert len(sections) > 10
    for part in (schema, *sections):
        assert part["additionalProperties"] is False
        for name, known in part["properties"].items():
            assert known.get("description") or "$ref" in known, name
    assert schema["properties"]["extends"]
    assert "required" not in schema
