from __future__ import annotations

import json
import runpy

from runs import ROOT

MADE = runpy.run_path(str(ROOT / "docs" / "make_config.py"))
SCHEMA_FILE, json_schema = MADE["SCHEMA_FILE"], MADE["json_schema"]
AGAIN = "run make docs"


def test_the_reference_is_current() -> None:
    assert MADE["REFERENCE_FILE"].read_text(encoding="utf-8") == MADE["reference"](), AGAIN


def test_the_json_schema_is_current() -> None:
    assert json.loads(SCHEMA_FILE.read_text(encoding="utf-8")) == json_schema(), AGAIN


def test_the_configs_point_editors_at_the_schema() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        first = path.read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=../dist_train/config/schema.json", path
        assert (path.parent / first.partition("=")[2]).resolve() == SCHEMA_FILE


def test_the_json_schema_describes_every_key_and_closes_every_section() -> None:
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for name, known in part["properties"].items():
            assert known.get("description") or "$ref" in known, name
    assert schema["properties"]["extends"]
    assert "required" not in schema
