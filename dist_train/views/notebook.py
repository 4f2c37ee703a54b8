"""Notebooks: whether this code runs in one, and what a cell shows while it trains: a bar, rows and curves."""

from __future__ import annotations

import sys
from typing import Any

STYLE = "font:13px/1.5 system-ui,sans-serif;max-width:900px"
GRID = "display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:10px"


def shell() -> Any:
    """IPython's shell if this code runs in one, a notebook's kernel or `ipython`; else None. Imports nothing."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None
