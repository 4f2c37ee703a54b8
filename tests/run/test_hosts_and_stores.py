"""Ranks whose hosts share a store and nothing else: what each of them records is in the store at the end."""

from __future__ import annotations

import json
import socket
import uuid
from pathlib import Path

import numpy as np
from runs import CONFIGS, start, traced

from dist_train.runtime.storage import open_storage
from dist_train.tracking.digests import Digests, file_name

STEPS = 6
CONFIG = f"""
extends: {CONFIGS / "digits_mlp.yaml"}
data: {{global_batch_size: 9, num_workers: 0, test: null}}
trainer: {{duration: {STEPS}step, evaluate_every: 100step}}
checkpoint: {{every: 2step}}
tracking: {{tensorboard: false, report: false}}
debug: {{trace_samples: true, digest: true}}
"""


def job(folder: Path, caches: list[str], *options: str) -> None:
    """A start with as many ranks as `caches`, which names the directory where each keeps its files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(len(caches)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank, cache in enumerate(caches):
        env = {**place, "RANK": str(rank), "XDG_CACHE_HOME": str(folder / cache)}
        ranks.append(start(folder, 1, "--config", "c.yaml", *options, env=env))
    try:
        for process in ranks:
            out, err = process.communicate(timeout=240)
            assert process.returncode in (0, 75), out + err
    finally:
        for process in ranks:
            process.kill()


def test_every_rank_s_records_reach_the_store_whichever_directory_it_keeps_them_in(
    s3_port: int, tmp_path: Path
) -> None:
    """Ranks 0 and 2 share a cache and rank 1 has its own; resumed with the two caches exchanged, which then hold copies of
    files that other ranks write."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    place = f"s3://bucket/{uuid.uuid4().hex}"
    options = (f"run.dir={place}", "run.name=far")
    job(tmp_path, ["a", "b", "a"], *options, "trainer.stop_at=3step")
    first = open_storage(f"{place}/far")
    logs = [first.read_bytes(f"logs/rank-{rank}.log") for rank in range(3)]
    job(tmp_path, ["b", "a", "b"], *options)

    storage, there = open_storage(f"{place}/far"), tmp_path / "there"
    storage.fs.get(f"{place}/far/trace", str(there / "trace"), recursive=True)  # type: ignore[attr-defined]
    assert [path.name for path in sorted((there / "trace").glob("*.jsonl"))] == [
        f"attempt-{attempt}-rank-{rank}.jsonl" for attempt in range(2) for rank in range(3)
    ]
    samples = traced(there)
    assert {step: len(indices) for step, indices in samples.items()} == dict.fromkeys(range(1, STEPS + 1), 9)
    assert len(set().union(*samples.values())) == 9 * STEPS, "none twice"
    digests = [Digests.parse(storage.read_bytes(file_name(rank))) for rank in range(3)]
    for rank in range(3):
        assert digests[rank].steps.tolist() == list(range(1, STEPS + 1))
        assert np.array_equal(digests[rank].values, digests[0].values), "reduced gradients and weights are all ranks'"
        log = storage.read_bytes(f"logs/rank-{rank}.log")
        assert log.startswith(logs[rank])
        assert b"resuming from step 3" in log[len(logs[rank]) :]
    assert json.loads(storage.read_bytes("status.json"))["state"] == "completed"
    assert not [name for name in storage.walk() if ".tmp-" in name]
    assert not list(tmp_path.glob("[ab]/**/.tmp-*"))
