"""A manifest is the bytes that were written, or it is refused."""

from __future__ import annotations

import hashlib
import json

import pytest

from dist_train.checkpoint.manifest import DamagedError, FileEntry, Manifest, NewerFormatError

MANIFEST = Manifest(
    step=200,
    files={"model.pt": FileEntry(10, "ab" * 32, "model.pt"), "x.pt": FileEntry(7, "cd" * 32, "1f/x.pt")},
    attempt="00ff00ff",
    metrics={"val/accuracy": 0.5, "tiny": 1e-07},
    meta={"position": 12800, "name": "Stra\u00dfe", "nested": {"a": [1, None, True]}},
    created_at="2026-01-01T00:00:00.000+00:00",
    lease=3,
)


def test_a_manifest_survives_its_bytes() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST


def test_every_flipped_bit_is_damage() -> None:
    raw = MANIFEST.to_bytes()
    for position in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[position // 8] ^= 1 << position % 8
        with pytest.raises(DamagedError):
            Manifest.from_bytes(bytes(changed))


def test_every_cut_is_damage() -> None:
    raw = MANIFEST.to_bytes()
    for length in range(len(raw)):
        with pytest.raises(DamagedError):
            Manifest.from_bytes(raw[:length])


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", b"null", b"\x00" * 300, b"\xff\xfe", b"[" * 100_000, b'{"sha256": 1}']
)
def test_garbage_is_damage(raw: bytes) -> None:
    with pytest.raises(DamagedError):
        Manifest.from_bytes(raw)


def test_bytes_that_mean_the_same_are_damage() -> None:
    raw = MANIFEST.to_bytes()
    for changed in (raw.replace(b"1e-07", b"1E-07"), raw.replace(b"\\u00df", b"\\u00DF"), raw + b" "):
        assert json.loads(changed) == json.loads(raw)
        with pytest.raises(DamagedError):
            Manifest.from_bytes(changed)


def test_a_newer_version_is_an_error_of_its_own() -> None:
    content = json.loads(MANIFEST.to_bytes())
    del content["sha256"]
    content |= {"format": 2, "unheard of": True}
    own = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    with pytest.raises(NewerFormatError, match=r"format 2 is newer than format 1.*update dist_train"):
        Manifest.from_bytes(json.dumps({**content, "sha256": own}).encode())


def test_the_hash_stands_last() -> None:
    assert list(json.loads(MANIFEST.to_bytes()))[-1] == "sha256"


def test_metrics_that_are_not_finite_are_null_and_meta_must_be_json() -> None:
    raw = Manifest(1, {}, "a", metrics={"loss": float("nan"), "f1": 1.0, "x": float("inf")}).to_bytes()
    assert json.loads(raw)["metrics"] == {"loss": None, "f1": 1.0, "x": None}
    assert str(Manifest.from_bytes(raw).metrics) == "{'loss': nan, 'f1': 1.0, 'x': nan}"
    with pytest.raises(ValueError, match=r"JSON"):
        Manifest(1, {}, "a", meta={"loss": float("nan")}).to_bytes()
