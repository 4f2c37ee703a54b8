"""Numbers, sizes, times and tables as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 100


def format_number(name: str, value: float) -> str:
    """A metric as people read it: 0.4321, 0.08 (lr), 12,345 (rates and counts), 1.2e-05."""
    if isinstance(value, int):
        return f"{value:,}"
    if name.endswith("_per_s"):
        return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"
    if name == "lr" or name.startswith("lr"):
        return f"{value:.4g}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 or value != value else f"{value:.3e}"


def format_seconds(seconds: float) -> str:
    """0:12, 4:05, 2:30:00, 3d 04:00."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_bytes(size: float) -> str:
    """12.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def aligned(rows: Sequence[Sequence[str]], right: int | None = None) -> list[str]:
    """Rows of cells as lines with aligned columns; column `right` holds numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(f"{cell:{'>' if k == right else '<'}{widths[k]}}" for k, cell in enumerate(row)).rstrip()
        for row in rows
    ]


def two_columns(lines: Sequence[tuple[str, str]], width: int = WIDTH) -> list[str]:
    """Aligned "label  value" lines of at most `width` columns; long values wrap within their column."""
    left = max((len(label) for label, _ in lines), default=0)
    wrap = textwrap.TextWrapper(max(20, width - left - 4), break_long_words=False, break_on_hyphens=False).wrap
    out = []
    for label, value in lines:
        pieces = [piece for part in str(value).splitlines() or [""] for piece in wrap(part) or [""]]
        out += [f"  {name:<{left}}  {piece}".rstrip() for name, piece in zip([label] + [""] * len(pieces), pieces)]
    return out
