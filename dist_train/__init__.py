"""Distributed PyTorch training from one YAML file, with the same result on any number of processes."""

from __future__ import annotations

__version__ = "0.1.0"
