"""A checkpoint corrupted in any way is never loaded; the next older one is used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_states import assert_intact, save

from dist_train.checkpoint.manager import CheckpointManager
from dist_train.checkpoint.manifest import MANIFEST, CheckpointError, CorruptedError, NewerFormatError
from dist_train.checkpoint.store import CheckpointStore, find_at
from dist_train.files import StorageError
from dist_train.main import main
from dist_train.runtime.storage import Storage, open_storage

Make = Callable[..., CheckpointManager]
OLD, NEW = 10, 20


def path_of(storage: Storage, step: int, file: str) -> str:
    """Name of a file of a checkpoint within the storage."""
    name = f"step-{step:08d}"
    if storage.is_local or file == MANIFEST:
        return f"{name}/{file}"
    (attempt,) = [entry for entry in storage.list(name) if entry != MANIFEST]
    return f"{name}/{attempt}/{file}"


def flip(storage: Storage, name: str, other: bytes) -> None:
    raw = bytearray(storage.read_bytes(name))
    raw[len(raw) // 2] ^= 0x10
    storage.write_atomic(name, bytes(raw))


def cut(storage: Storage, name: str, other: bytes) -> None:
    storage.write_atomic(name, storage.read_bytes(name)[:-1])


def lengthen(storage: Storage, name: str, other: bytes) -> None:
    storage.write_atomic(name, storage.read_bytes(name) + b"\0")


def empty(storage: Storage, name: str, other: bytes) -> None:
    storage.write_atomic(name, b"")


def delete(storage: Storage, name: str, other: bytes) -> None:
    storage.delete(name)


def replace(storage: Storage, name: str, other: bytes) -> None:
    storage.write_atomic(name, other)


MATRIX = [(file, change) for file in ("model.pt", "optimizer.pt", MANIFEST)
          for change in (flip, cut, lengthen, empty, delete, replace)]  # fmt: skip
CASES = [(kind, *case) for kind in ("local", "memory") for case in MATRIX]
CASES += [("s3", "model.pt", delete), ("s3", MANIFEST, flip), ("s3", MANIFEST, delete)]  # S3 is slow


@pytest.mark.parametrize(("storage", "file", "change"), CASES, indirect=["storage"])
def test_a_corrupted_checkpoint_is_quarantined_and_the_next_is_taken(
    storage: Storage, manager_at: Make, lines: list[str], file: str, change: Callable[[Storage, str, bytes], None]
) -> None:
    save(manager_at(storage), OLD, NEW)
    name = path_of(storage, NEW, file)
    change(storage, name, storage.read_bytes(path_of(storage, OLD, file)))
    if not storage.is_local and (file, change) == (MANIFEST, delete):
        # Without its manifest, a prefix on a store is what a killed save leaves.
        assert [row.state for row in CheckpointStore(storage).verify_all()] == ["good"]
        assert_intact(manager_at(storage).newest(), OLD)
        assert not storage.walk("step-00000020")
        return
    before = storage.walk("step-00000020")

    rows = CheckpointStore(storage).verify_all()
    assert [(row.step, row.state) for row in rows] == [(OLD, "good"), (NEW, "corrupted")]
    assert file in rows[1].reason
    lines.clear()
    manager = manager_at(storage)
    assert_intact(manager.newest(), OLD)
    assert len(lines) == 1
    assert "step-00000020 is corrupted" in lines[0]
    assert file in lines[0]

    # Its bytes stay, it is never read again, and the run can save the same step again.
    aside = storage.walk("damaged-step-00000020-1" if storage.is_local else "step-00000020")
    assert sorted(aside.values()) == sorted(before.values())
    again = manager_at(storage)
    again.newest()
    assert len(lines) == 1
    save(again, NEW)
    assert_intact(manager_at(storage).newest(), NEW)
    assert set(aside) - {path_of(storage, NEW, MANIFEST)} <= set(storage.walk())
    assert [row.state for row in CheckpointStore(storage).verify_all()] == ["good", "good", "quarantined"]


def test_no_whole_checkpoint_is_an_error_and_never_a_silent_start(
    storage: Storage, manager_at: Make, lines: list[str]
) -> None:
    save(manager_at(storage), OLD, NEW)
    for step in (OLD, NEW):
        flip(storage, path_of(storage, step, "model.pt"), b"")
    for _ in range(2):  # the second start finds only what the first quarantined
        with pytest.raises(CheckpointError, match=r"no intact checkpoint is left.*give the run another run.name"):
            manager_at(storage).newest()
    assert len([line for line in lines if "is corrupted" in line]) == 2


def test_readers_skip_corrupted_checkpoints_and_change_nothing(
    storage: Storage, manager_at: Make, lines: list[str]
) -> None:
    save(manager_at(storage, keep_best=("f1", "max")), NEW, f1=0.9)
    save(manager_at(storage, keep_best=("f1", "max")), NEW + 1, f1=0.5)
    flip(storage, path_of(storage, NEW, "model.pt"), b"")
    before = storage.walk()
    store = CheckpointStore(storage, lines.append)
    best = store.best("f1", "max")
    assert best is not None
    assert best.step == NEW + 1
    with pytest.raises(CorruptedError, match=r"model\.pt"):
        store.find("step-20")
    assert storage.walk() == before


def test_corruption_after_the_check_is_found_by_the_load(storage: Storage, manager_at: Make) -> None:
    save(manager_at(storage), NEW)
    found = manager_at(storage).newest()
    assert found is not None
    flip(storage, path_of(storage, NEW, "model.pt"), b"")
    with pytest.raises(CorruptedError, match=r"model\.pt: its sha256"):
        found.load("model")
    assert found.load("optimizer")["step"] == NEW


def test_a_newer_format_stops_the_start_and_is_no_corruption(storage: Storage, manager_at: Make) -> None:
    save(manager_at(storage), OLD, NEW)
    name = path_of(storage, NEW, MANIFEST)
    content = json.loads(storage.read_bytes(name))
    del content["sha256"]
    content["format"] = 2
    own = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    storage.write_atomic(name, json.dumps({**content, "sha256": own}).encode())
    before = storage.walk()
    with pytest.raises(NewerFormatError, match=r"update dist_train"):
        manager_at(storage).newest()
    assert storage.walk() == before
    assert [row.state for row in CheckpointStore(storage).verify_all()] == ["good", "newer"]


def test_a_manifest_of_another_step_is_corrupted(storage: Storage, manager_at: Make) -> None:
    save(manager_at(storage), OLD, NEW)
    storage.write_atomic(path_of(storage, NEW, MANIFEST), storage.read_bytes(path_of(storage, OLD, MANIFEST)))
    (_, row) = CheckpointStore(storage).verify_all()
    assert row.reason == "manifest.json: is that of step 10"


class Attack:
    """Unpickles into a call."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch attacked",)


def test_a_malicious_checkpoint_runs_no_code(tmp_path: Path, manager_at: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    manager = manager_at(open_storage(tmp_path))
    save(manager, NEW)
    folder = tmp_path / "step-00000020"
    files = {}
    for protocol, part in enumerate(("zip", "plain")):
        if part == "zip":
            torch.save({"weight": torch.ones(2), "evil": Attack()}, folder / "zip.pt")
        else:
            (folder / "plain.pt").write_bytes(pickle.dumps(Attack(), protocol + 1))
        raw = (folder / f"{part}.pt").read_bytes()
        files[f"{part}.pt"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["sha256"]
    content["files"] = files
    own = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**content, "sha256": own}, indent=1) + "\n")
    found = manager_at(open_storage(tmp_path)).newest()  # the hashes of the forger are right
    assert found is not None
    for part in ("zip", "plain"):
        with pytest.raises(CheckpointError, match=r"refused: it holds objects that only running code could rebuild"):
            found.load(part)
    assert not Path("attacked").exists()
    pickle.loads(pickle.dumps(Attack()))  # the control: the attack works
    assert Path("attacked").exists()


def test_an_unreadable_disk_is_no_corruption(tmp_path: Path, manager_at: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path, patience=0.3)
    save(manager_at(storage), OLD, NEW)
    real, failures = storage._open, [5]

    def failing(name: str) -> object:
        if name.endswith("model.pt") and failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error", name)
        return real(name)

    monkeypatch.setattr(storage, "_open", failing)
    with pytest.raises(StorageError, match=r"cannot read .*step-00000020/model\.pt: OSError.*Input/output error"):
        manager_at(storage).newest()
    assert sorted(storage.list()) == ["step-00000010", "step-00000020"]
    failures[0] = 1  # one that passes is not even noticed
    assert_intact(manager_at(storage).newest(), NEW)


def test_a_checkpoint_is_found_by_any_path_that_leads_to_it(tmp_path: Path, manager_at: Make) -> None:
    save(manager_at(open_storage(tmp_path / "run" / "checkpoints")), OLD, NEW)
    assert_intact(find_at(str(tmp_path / "run")), NEW)
    assert_intact(find_at(str(tmp_path / "run" / "checkpoints") + "/"), NEW)
    assert_intact(find_at(str(tmp_path / "run" / "checkpoints" / "step-00000010")), OLD)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-00000015'.*found: step-00000020, step-00000010"):
        find_at(str(tmp_path / "run" / "checkpoints" / "step-00000015"))
    with pytest.raises(CheckpointError, match=r"no checkpoint 'last'.*found: none"):
        find_at(str(tmp_path / "elsewhere"))


def test_a_wrong_part_is_named_with_those_that_are_there(tmp_path: Path, manager_at: Make) -> None:
    manager = manager_at(open_storage(tmp_path))
    save(manager, NEW)
    with pytest.raises(CheckpointError, match=r"has no part 'ema'; it has model, optimizer"):
        manager.find("last").load("ema")


def test_verify_prints_a_line_for_each_and_fails_where_one_is_corrupted(
    tmp_path: Path, manager_at: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(tmp_path / "checkpoints")
    save(manager_at(storage), OLD, NEW)
    assert main(["verify", "--run", str(tmp_path)]) == 0
    flip(storage, path_of(storage, NEW, "optimizer.pt"), b"")
    capsys.readouterr()
    assert main(["verify", "--run", str(tmp_path)]) == 1
    old, new, total = capsys.readouterr().out.splitlines()
    assert old.split() == ["step-00000010", "good"]
    assert new.startswith("step-00000020            corrupted   optimizer.pt: its sha256 is ")
    assert total == "1 of 2 checkpoints are intact"
