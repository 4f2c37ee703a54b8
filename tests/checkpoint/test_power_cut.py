"""The power fails at any moment: what a disk surely holds by then, what was synced, is complete checkpoints or none."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_states import assert_intact, save

from dist_train.checkpoint.manager import CheckpointManager, SavePolicy
from dist_train.checkpoint.manifest import CorruptedError
from dist_train.checkpoint.store import CheckpointStore
from dist_train.runtime.storage import open_storage

CALLS = ("fsync", "rename", "replace", "link", "unlink", "remove", "rmdir", "mkdir")


class Disk:
    """What would be left of a directory if the power failed now: `fsync` makes bytes and names durable, nothing else does.

    Attributes:
        lost: is shown what a disk may have kept, after each call that changes it: with the names that were synced only, and
            with all names as they are (a journal may have written them), each time with the bytes that were synced.
        forgets: calls of fsync that this disk ignores, for files or for directories.
    """

    def __init__(self, root: Path, lost: Callable[[Path], None], forgets: str, scratch: Path) -> None:
        self.root, self.lost, self.forgets, self.scratch = root, lost, forgets, scratch
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.kinds: dict[int, bool] = {}  # whether it is a directory
        self.held: list[int] = []  # descriptors: what was synced keeps its inode
        self.looking = False
        self.events = 0

    def spied(self, call: str) -> Callable[..., Any]:
        """The function of `os`, after which the power may fail."""
        real = getattr(os, call)

        def function(*arguments: Any, **options: Any) -> Any:
            found = real(*arguments, **options)
            if not self.looking:
                self.looking = True
                self._after(call, arguments)
                self.looking = False
            return found

        return function

    def _after(self, call: str, arguments: tuple[Any, ...]) -> None:
        if call == "fsync":
            self._sync(arguments[0])
        for entries in (self._synced, self._current):
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            self._make(self.root.stat().st_ino, self.root, self.scratch, entries)
            self.lost(self.scratch)
        self.events += 1

    def _sync(self, descriptor: int) -> None:
        state, path = os.fstat(descriptor), Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        folder = stat.S_ISDIR(state.st_mode)
        if self.forgets == ("directories" if folder else "files"):
            return
        self.held.append(os.dup(descriptor))
        if folder:
            self.names[state.st_ino] = self._current(state.st_ino, path)
        else:
            self.bytes[state.st_ino] = path.read_bytes()

    def _current(self, inode: int, path: Path) -> dict[str, int]:
        entries = {child.name: child.stat() for child in path.iterdir()} if path.is_dir() else {}
        self.kinds |= {state.st_ino: stat.S_ISDIR(state.st_mode) for state in entries.values()}
        return {name: state.st_ino for name, state in entries.items()}

    def _synced(self, inode: int, path: Path) -> dict[str, int]:
        return self.names.get(inode, {})

    def _make(self, inode: int, path: Path, copy: Path, entries: Callable[[int, Path], dict[str, int]]) -> None:
        for name, child in entries(inode, path).items():
            if self.kinds[child]:
                (copy / name).mkdir()
                self._make(child, path / name, copy / name, entries)
            else:
                (copy / name).write_bytes(self.bytes.get(child, b""))


def power_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: str = "nothing") -> tuple[int, list[str]]:
    """Saves three checkpoints, of which two are kept; how many moments there were, and what went wrong."""
    root = tmp_path / "checkpoints"
    root.mkdir()
    promised, wrong = 0, []  # promised: the step of the last save that has returned

    def lost(there: Path) -> None:
        store = CheckpointStore(open_storage(there), log=wrong.append)  # lists what is corrupted
        kept = [found.step for found in store.published()]
        for step in kept:
            try:
                assert_intact(store.open(step), step)
            except CorruptedError as error:
                wrong.append(f"step {step}: {error}")
        if max(kept, default=0) < promised:
            wrong.append(f"{kept}, but {promised} was saved")

    disk = Disk(root, lost, forgets, tmp_path / "left")
    manager = CheckpointManager(open_storage(root), SavePolicy(keep_last=2), log=lambda line: None)
    with monkeypatch.context() as patch:
        for call in CALLS:
            patch.setattr(os, call, disk.spied(call))
        for step in (1, 2, 3):
            save(manager, step)
            promised = step
    for descriptor in disk.held:
        os.close(descriptor)
    return disk.events, wrong


def test_a_power_cut_after_any_call_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments, wrong = power_may_fail(tmp_path, monkeypatch)
    assert wrong == []
    assert moments >= 20


@pytest.mark.parametrize("forgets", ["files", "directories"])
def test_the_check_sees_a_missing_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: str) -> None:
    assert power_may_fail(tmp_path, monkeypatch, forgets)[1] != []
