"""Records a command in a terminal of its own as an animated SVG: `python docs/record.py OUT.svg -- COMMAND ...` (extra `docs`).

The command runs for real, in a pseudo-terminal that pyte interprets. Each change of the screen is a frame; equal lines are stored
once. What `PATH`, `HOME` and the working directory show is that of the caller: record from an empty directory.
"""

from __future__ import annotations

import argparse
import fcntl
import html
import os
import pty
import select
import shlex
import struct
import termios
import time
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path

import pyte

Line = tuple[tuple[str, str], ...]  # (CSS classes, text) of each run of characters
Frame = tuple[float, tuple[Line, ...]]  # when it appeared, in seconds, and the screen
LINE, CHARACTER, MARGIN, BAR = 18.0, 8.4, 16.0, 28.0  # pixels, at a font size of 14
COLORS = {
    "black": "#6e7681", "red": "#ff7b72", "green": "#3fb950", "brown": "#d29922", "blue": "#58a6ff", "magenta": "#bc8cff",
    "cyan": "#39c5cf", "white": "#e6edf3", "brightblack": "#8b949e", "brightred": "#ffa198", "brightgreen": "#56d364",
    "brightbrown": "#e3b341", "brightblue": "#79c0ff",
    "brightmagenta": "#d2a8ff", "brightcyan": "#56d4dd", "brightwhite": "#ffffff",
}  # fmt: skip
EACH = 0.4  # seconds between two frames, at least
MOST_IDLE = 1.2  # seconds that a still screen is shown, at most
LONGEST = 24.0  # seconds of the whole, which is played faster if it took longer
LAST = 8.0  # seconds that the last screen stays


def record(command: Sequence[str], columns: int, rows: int, shown: str) -> list[Frame]:
    """Run a command and keep its screens, `EACH` seconds apart. `shown` is typed at a prompt first."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    stream.feed(f"\x1b[32m$\x1b[0m {shown}\r\n".encode())
    frames = [(0.0, picture(screen))]
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
        os.execvp(command[0], list(command))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    start = time.monotonic()
    while True:
        ready = select.select([terminal], [], [], 0.1)[0]
        try:
            data = os.read(terminal, 65536) if ready else b""
        except OSError:  # the command has ended
            break
        if ready and not data:
            break
        stream.feed(data)
        now, lines = time.monotonic() - start, picture(screen)
        if lines != frames[-1][1] and now - frames[-1][0] >= EACH:
            frames.append((now, lines))
    if picture(screen) != frames[-1][1]:
        frames.append((time.monotonic() - start, picture(screen)))
    os.waitpid(process, 0)
    return frames


def thinned(frames: list[Frame], most: int = 90) -> list[Frame]:
    """At most so many frames, evenly; the first and the last stay."""
    every = max(1.0, (len(frames) - 1) / (most - 1))
    return [frames[round(k * every)] for k in range(int((len(frames) - 1) / every) + 1)]


def picture(screen: pyte.Screen) -> tuple[Line, ...]:
    """The lines of a screen, as runs of characters that look alike."""
    lines = []
    for y in range(screen.lines):
        row = screen.buffer[y]
        cells = [(style(row[x]), row[x].data) for x in range(screen.columns)]
        runs = [(look, "".join(data for _, data in group)) for look, group in groupby(cells, key=lambda cell: cell[0])]
        lines.append(tuple(runs) if any(text.strip() for _, text in runs) else ())
    return tuple(lines)


def style(cell: pyte.screens.Char) -> str:
    color = cell.fg if cell.fg in COLORS else ""
    return " ".join([name for name, on in ((color, color), ("bold", cell.bold)) if on])


def animation(frames: Sequence[Frame], columns: int, rows: int) -> str:
    """The SVG: a strip of all frames that moves past a window; the last one where nothing moves."""
    times = [0.0]
    for (before, _), (now, _) in pairwise(frames):
        times.append(times[-1] + min(now - before, MOST_IDLE))
    times = [at * min(1.0, LONGEST / max(times[-1], 1e-9)) for at in times]
    whole = times[-1] + LAST
    width, height = columns * CHARACTER + 2 * MARGIN, rows * LINE + 2 * MARGIN
    stored: dict[Line, int] = {}
    strip = []
    for number, (_, lines) in enumerate(frames):
        for y, line in enumerate(lines):
            if line:
                place = stored.setdefault(line, len(stored))
                strip.append(f'<use href="#l{place}" y="{number * height + (y + 1) * LINE:g}"/>')
    keys = "".join(f"{100 * at / whole:.2f}%{{transform:translateY({-k * height:g}px)}}" for k, at in enumerate(times))
    last = -(len(frames) - 1) * height
    colors = "".join(f".{name}{{fill:{value}}}" for name, value in COLORS.items())
    lines_of = "".join(f'<text id="l{k}" xml:space="preserve">{_spans(line)}</text>' for line, k in stored.items())
    dots = "".join(f'<circle cx="{20 + 20 * k}" cy="{BAR / 2 + 2:g}" r="5" fill="#484f58"/>' for k in range(3))
    fonts = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
    full = f'width="{width:g}" height="{height + BAR:g}"'
    window = f'x="{MARGIN:g}" y="{BAR + MARGIN / 2:g}" width="{width - 2 * MARGIN:g}" height="{height - MARGIN / 2:g}"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height + BAR:g}" {full}>
<style>text{{font:14px {fonts};fill:#e6edf3}}.bold{{font-weight:bold}}{colors}
#strip{{animation:play {whole:.2f}s steps(1,end) infinite}}
@keyframes play{{{keys}100%{{transform:translateY({last:g}px)}}}}
@media (prefers-reduced-motion:reduce){{#strip{{animation:none}}}}</style>
<rect width="100%" height="100%" rx="8" fill="#0d1117"/>{dots}
<defs>{lines_of}</defs>
<svg {window}><g id="strip" transform="translate(0 {last:g})">{"".join(strip)}</g></svg>
</svg>
"""


def _spans(line: Line) -> str:
    """Each run at its own column, so that a font of another width can't shift the columns."""
    spans, column = [], 0
    for look, text in line:
        if text.strip():
            start = column + len(text) - len(text.lstrip())
            kept = html.escape(text.strip(), quote=False)
            length = len(text.strip()) * CHARACTER
            style = f' class="{look}"' if look else ""
            spans.append(f'<tspan x="{start * CHARACTER:g}" textLength="{length:g}"{style}>{kept}</tspan>')
        column += len(text)
    return "".join(spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--columns", type=int, default=80)
    parser.add_argument("--rows", type=int, default=28)
    parser.add_argument("--shown", help="what is typed at the prompt; by default the command itself")
    parser.add_argument("command", nargs="+", help="behind --")
    options = parser.parse_args()
    shown = options.shown or shlex.join(options.command)
    frames = record(options.command, options.columns, options.rows, shown)
    used = max(k + 1 for _, lines in frames for k, line in enumerate(lines) if line)
    frames = [(at, lines[:used]) for at, lines in thinned(frames)]
    options.out.write_text(animation(frames, options.columns, used), encoding="utf-8")
    print(f"{options.out}: {len(frames)} frames, {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
