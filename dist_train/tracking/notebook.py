"""Notebooks: whether this code runs in one, and the bar and curves that a cell shows while it trains."""

from __future__ import annotations

import sys
from typing import Any


def shell() -> Any:
    """IPython's shell if this code runs in one, a notebook's kernel or `ipython`; else None. Imports nothing."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None
