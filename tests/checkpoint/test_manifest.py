"""A manifest is the bytes that were written, or it is refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from dist_train.checkpoint.manifest import CorruptedError, FileEntry, Manifest, NewerFormatError

MANIFEST = Manifest(
    step=200,
    files={"model.pt": FileEntry(10, "ab" * 32, "model.pt"), "x.pt": FileEntry(7, "cd" * 32, "00ff00ff/x.pt")},
    attempt="00ff00ff",
    metrics={"val/accuracy": 0.5, "tiny": 1e-07},
    meta={"position": 12800, "name": "Stra\u00dfe", "nested": {"a": [1, None, True]}},
    created_at="2026-01-01T00:00:00.000+00:00",
    lease=3,
)


def test_a_manifest_survives_its_bytes() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST


# Written by the first version of format 1. Never edit it: a version that can't read it would call every older checkpoint
# corrupted.
FORMAT_1 = """{
 "format": 1,
 "step": 200,
 "attempt": "00ff00ff00ff00ff",
 "created_at": "2026-11-27T22:57:19.998Z",
 "lease": 3,
 "metrics": {
  "val/loss": 0.25,
  "val/f1": null
 },
 "files": {
  "model.pt": {
   "bytes": 1234,
   "sha256": "abababababababababababababababababababababababababababababababab"
  },
  "trainer.pt": {
   "bytes": 567,
   "sha256": "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
   "key": "00ff00ff00ff00ff/trainer.pt"
  }
 },
 "meta": {
  "epoch": 3,
  "samples": 12800,
  "world_size": 2,
  "best": [
   "val/loss",
   "min"
  ],
  "plan": {
   "length": 1257,
   "fingerprint": "dba7bce815d7603a"
  },
  "horizon": 440,
  "config": {
   "seed": 0
  },
  "versions": {
   "dist_train": "0.1.0"
  },
  "host": "vm"
 },
 "sha256": "442702976a0a950478585dedf276f4f9b7d87c54860c734d11fd4e858886eeaa"
}
"""


def test_a_manifest_of_format_1_stays_readable() -> None:
    found = Manifest.from_bytes(FORMAT_1.encode())
    assert (found.step, found.attempt, found.lease) == (200, "00ff00ff00ff00ff", 3)
    assert found.created_at == "2026-11-27T22:57:19.998Z"
    assert str(found.metrics) == "{'val/loss': 0.25, 'val/f1': nan}"
    assert found.files == {
        "model.pt": FileEntry(1234, "ab" * 32, "model.pt"),
        "trainer.pt": FileEntry(567, "cd" * 32, "00ff00ff00ff00ff/trainer.pt"),
    }
    keys = ["epoch", "samples", "world_size", "best", "plan", "horizon", "config", "versions", "host"]
    assert list(found.meta) == keys
    assert found.to_bytes() == FORMAT_1.encode()


def test_every_flipped_bit_is_corruption() -> None:
    raw = MANIFEST.to_bytes()
    for position in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptedError):
            Manifest.from_bytes(bytes(changed))


def test_every_truncation_is_corruption() -> None:
    raw = MANIFEST.to_bytes()
    for length in range(len(raw)):
        with pytest.raises(CorruptedError):
            Manifest.from_bytes(raw[:length])


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"null", b"\x00" * 300, b"\xff\xfe", b"[" * 100_000, b'{"sha256": 1}']
)
def test_garbage_is_corruption(raw: bytes) -> None:
    with pytest.raises(CorruptedError):
        Manifest.from_bytes(raw)


def test_other_bytes_of_the_same_meaning_are_corruption() -> None:
    raw = MANIFEST.to_bytes()
    for changed in (raw.replace(b"1e-07", b"1E-07"), raw.replace(b"\\u00df", b"\\u00DF"), raw + b" "):
        assert json.loads(changed) == json.loads(raw)
        with pytest.raises(CorruptedError):
            Manifest.from_bytes(changed)


def test_a_newer_version_is_an_error_of_its_own() -> None:
    content = json.loads(MANIFEST.to_bytes())
    del content["sha256"]
    content |= {"format": 2, "unheard of": True}
    own = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    with pytest.raises(NewerFormatError, match=r"format 2 is newer than format 1.*update dist_train"):
        Manifest.from_bytes(json.dumps({**content, "sha256": own}).encode())


def signed(**changed: Any) -> bytes:
    """A manifest with other fields (None removes one) and the right hash, as a forger or a broken tool would write it."""
    content = json.loads(MANIFEST.to_bytes()) | changed
    content = {name: value for name, value in content.items() if value is not None and name != "sha256"}
    own = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return (json.dumps({**content, "sha256": own}, indent=1) + "\n").encode()


GOOD = {"bytes": 10, "sha256": "ab" * 32}
WRONG: list[dict[str, Any]] = [
    *({name: None} for name in ("step", "files", "attempt", "metrics", "meta", "created_at")),
    {"step": -1}, {"step": "200"}, {"step": True}, {"step": 2.0}, {"attempt": "../x"}, {"attempt": 7}, {"attempt": ""},
    {"metrics": [1]}, {"metrics": {"loss": "low"}}, {"meta": []}, {"created_at": 5}, {"lease": "3"}, {"format": "1"},
    {"files": []}, {"files": {}}, {"files": {"model.pt": 5}}, {"files": {"model.pt": {}}},
    *({"files": {name: GOOD}} for name in ("../model.pt", "/etc/passwd", "a/b.pt", "", ".", "..", ".lease", "manifest.json")),
    *({"files": {"m.pt": GOOD | {"key": key}}} for key in ("../m.pt", "/m.pt", "1f/m.pt", "00ff00ff/../m.pt", 3)),
    *({"files": {"m.pt": GOOD | {"bytes": size}}} for size in (-1, 0, "10", 1.5, True)),
    *({"files": {"m.pt": GOOD | {"sha256": digest}}} for digest in ("ab" * 31, "zz" * 32, 5)),
]  # fmt: skip


@pytest.mark.parametrize("changed", WRONG, ids=repr)
def test_a_right_hash_over_wrong_fields_is_corruption(changed: dict[str, Any]) -> None:
    assert Manifest.from_bytes(signed()) == MANIFEST  # the control: the hash is made right
    with pytest.raises(CorruptedError):
        Manifest.from_bytes(signed(**changed))


def test_the_hash_is_the_last_field() -> None:
    assert list(json.loads(MANIFEST.to_bytes()))[-1] == "sha256"


def test_metrics_that_are_not_finite_are_null_and_meta_must_be_json() -> None:
    raw = Manifest(
        1, MANIFEST.files, "00ff00ff", metrics={"loss": float("nan"), "f1": 1.0, "x": float("inf")}
    ).to_bytes()
    assert json.loads(raw)["metrics"] == {"loss": None, "f1": 1.0, "x": None}
    assert str(Manifest.from_bytes(raw).metrics) == "{'loss': nan, 'f1': 1.0, 'x': nan}"
    with pytest.raises(ValueError, match=r"JSON"):
        Manifest(1, {}, "a", meta={"loss": float("nan")}).to_bytes()
