"""The terminal: its width, its colors, and one line at its bottom, above which everything else is printed."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

from dist_train.config.errors import mask
from dist_train.text import WIDTH

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_ERASE = "\r\x1b[J"


class Stream:
    """A text stream that masks secrets; silent once its reader has gone (`| head`, a closed terminal)."""

    def __init__(self, stream: TextIO | None) -> None:
        # Some services run without stdout.
        self._stream: Any = _nowhere() if stream is None or stream.closed else stream
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="replace")  # a C locale

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._quietly(lambda: self._stream.write(mask(text)))
        return len(text)

    def flush(self) -> None:
        self._quietly(lambda: self._stream.flush())

    def _quietly(self, act: Callable[[], object]) -> None:
        try:
            act()
        except (OSError, ValueError):  # the reader has gone, or the stream is closed
            lost, self._stream = self._stream, _nowhere()
            with contextlib.suppress(OSError, ValueError):  # Python flushes what is left when it exits (docs: SIGPIPE)
                os.dup2(self._stream.fileno(), lost.fileno())


def _nowhere() -> TextIO:
    return open(os.devnull, "w")


def is_terminal(stream: Any) -> bool:
    """Whether somebody looks at it who can see a line change: a terminal with cursor control, and no CI job's."""
    try:
        seen = bool(stream is not None and stream.isatty())
    except ValueError:  # it is closed
        seen = False
    return seen and not os.environ.get("CI") and os.environ.get("TERM", "dumb") != "dumb"


def has_color(stream: Any) -> bool:
    """Whether to use colors there (https://no-color.org)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def columns(stream: Any) -> int:
    """Columns of the terminal as it is now; 100 where there is none."""
    found, told = 0, os.environ.get("COLUMNS", "")
    if not is_terminal(stream):
        return WIDTH
    with contextlib.suppress(OSError, ValueError):
        found = os.get_terminal_size(stream.fileno()).columns
    return found or (int(told) if told.isdigit() and int(told) else WIDTH)


def cells(text: str) -> int:
    """How many columns a text takes; Chinese characters take two each."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def painted(text: str, style: str, color: bool = True) -> str:
    """The text in a style (`bold`, `dim`, or a color), if `color`."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if color and style and text else text


def wrapped(text: str, width: int, hanging: str = "    ") -> str:
    """Its lines wrapped at `width` columns with a hanging indent; a path or another long word stays whole, to be copied."""
    wrap = textwrap.TextWrapper(
        max(20, width), subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join("\n".join(wrap.wrap(line)) for line in text.splitlines())


class _Above:
    """sys.stdout or sys.stderr while there is a bottom line."""

    def __init__(self, theirs: TextIO, line: BottomLine) -> None:
        self.theirs, self._line = theirs, line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.theirs, name)

    def write(self, text: str) -> int:
        self._line.pass_through(self.theirs, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))


class BottomLine:
    """A line at the bottom of a terminal that changes in place. While it is open, what anybody prints appears above it.

    Text that somebody prints without an end of line (a prompt, another progress bar) hides it until that ends. Thread-safe.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream, self.color = stream, has_color(stream)
        self._lock = threading.RLock()
        self._text = ""
        self._drawn = False
        self._torn = False  # the cursor is behind a text that hasn't ended yet
        self._replaced: dict[str, _Above] = {}
        for name in ("stdout", "stderr"):
            theirs = getattr(sys, name)
            if is_terminal(theirs):
                self._replaced[name] = _Above(theirs, self)
                setattr(sys, name, self._replaced[name])

    def show(self, text: str, size: int | None = None) -> None:
        """Change the line; `size`: the columns that it takes, where it has escapes. One that is too long isn't shown."""
        with self._lock:
            self._text = text if (cells(text) if size is None else size) < columns(self.stream) else ""
            if self._text:
                self._draw()
            else:
                self._erase()

    def above(self, text: str) -> None:
        """Print lines above it."""
        with self._lock:
            self.stream.write(("\n" if self._torn else _ERASE if self._drawn else "") + text + "\n")
            self._drawn = self._torn = False
            self._draw()
            self.stream.flush()

    def pass_through(self, stream: TextIO, text: str) -> None:
        """What somebody else writes to the terminal. Raises what their stream raises."""
        if not text:
            return
        with self._lock:
            self._erase()
            stream.write(text)
            stream.flush()
            self._torn = not text.endswith(("\n", "\r"))  # a bar of tqdm's that doesn't stay ends with the latter
            self._draw()

    def close(self) -> None:
        """Remove the line, and restore sys.stdout and sys.stderr; idempotent, and never blocks for long."""
        if self._lock.acquire(timeout=1.0):
            try:
                self._text = ""
                self._erase()
            finally:
                self._lock.release()
        self.restore()

    def restore(self) -> None:
        """Restore sys.stdout and sys.stderr, unless somebody has replaced them since."""
        for name, mine in self._replaced.items():
            if getattr(sys, name) is mine:
                setattr(sys, name, mine.theirs)
        self._replaced = {}

    def _draw(self) -> None:
        # The cursor waits at its beginning, so that a terminal that becomes narrower leaves nothing of it behind.
        if self._text and not self._torn:
            self.stream.write(f"{'' if self._drawn else chr(13)}{self._text}\x1b[J\r")
            self.stream.flush()
            self._drawn = True

    def _erase(self) -> None:
        if self._drawn:
            self.stream.write(_ERASE)
            self.stream.flush()
            self._drawn = False


_line: BottomLine | None = None


def bottom_line(stream: Any = None) -> BottomLine | None:
    """The line at the bottom of this process's terminal; None where `stream`, by default stdout, isn't one."""
    global _line
    if _line is None and is_terminal(stream or sys.stdout):
        _line = BottomLine(Stream(stream or sys.stdout))
    return _line


def close_bottom_line() -> None:
    """Remove it, if there is one."""
    global _line
    line, _line = _line, None
    if line is not None:
        line.close()


def show_status(text: str) -> None:
    """Show what this process does at the bottom of the terminal, if stdout is one, until something else is shown there."""
    line = bottom_line()
    if line is not None:
        line.show(painted(text, "dim", line.color), cells(text))


def _in_a_fork() -> None:
    """A child of a fork (a loader worker) prints by itself: another thread may have held the lock."""
    global _line
    line, _line = _line, None
    if line is not None:
        line.restore()


os.register_at_fork(after_in_child=_in_a_fork)
