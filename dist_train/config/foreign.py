"""Names that people know from other tools (foreign.yaml), and the key to use here."""

from __future__ import annotations

from pathlib import Path

import yaml

_TABLES = yaml.safe_load(Path(__file__).with_name("foreign.yaml").read_text(encoding="utf-8"))
FOREIGN: dict[str, str] = {name: answer for answer, names in _TABLES["answers"].items() for name in names.split()}
SYNONYMS: dict[str, str] = {name: word for word, names in _TABLES["synonyms"].items() for name in names.split()}


def example_of(answer: str) -> str:
    """An answer of FOREIGN with an example for the value."""
    answer = answer.replace("{value}ep", "20ep").replace("{value}step", "500step")
    return answer.replace("={value}", "").replace("{key}", "...")
