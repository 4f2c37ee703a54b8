"""A small language model on packed documents, and on random windows of a file, is trained as a textbook's loop would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import trained
from runs import rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dist_train.data.plan import Plan
from dist_train.runtime.seeding import seed_everything, seed_sample

VOCABULARY, LENGTH, BATCH, STEPS, EOS = 11, 4, 6, 7, 10
RANDOM = np.random.RandomState(3)
DOCUMENTS = [RANDOM.randint(0, EOS, RANDOM.randint(1, 12)).tolist() for _ in range(24)]


class Bigrams(nn.Module):
    """Scores (B, V, T), as cross-entropy takes them; in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 5), nn.Linear(5, VOCABULARY)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh()).mT


def config_of(data: dict[str, Any]) -> dict[str, Any]:
    return {
        "data": {"train": data, "global_batch_size": BATCH},
        "model": {"_target_": "test_packed_tokens.Bigrams"},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.5, "momentum": 0.9},
        "trainer": {"duration": f"{STEPS}step", "log_every": "1step", "micro_batch_size": 4},
    }


def plain(windows: Any, count: int) -> list[float]:
    """The loss of each step; `windows(epoch, indices)` gives (B, LENGTH + 1)."""
    seed_everything(0)
    net, plan, losses = Bigrams(), Plan(0, count, BATCH), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for step in range(STEPS):
        batch = torch.tensor(windows(plan.epoch_of(step), plan.batch(step).tolist()))
        loss = cross_entropy(net(batch[:, :-1]), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_packed_documents_train_like_a_loop_over_a_plain_packing(tmp_path: Path) -> None:
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"ids": document}) + "\n" for document in DOCUMENTS))
    data = {"_target_": "dist_train.data.PackedTokens", "documents": str(tmp_path / "documents.jsonl")}
    config = config_of({**data, "length": LENGTH, "eos": EOS, "column": "ids"})
    for stop in ("3step", None):
        config["trainer"]["stop_at"] = stop
        run = trained(tmp_path, config)

    row = [token for document in DOCUMENTS for token in [*document, EOS]]
    count = (len(row) - 1) // LENGTH
    found = [entry["loss"] for entry in rows(run, "train")]
    assert found == pytest.approx(plain(lambda _, indices: [_window(row, k) for k in indices], count), rel=1e-12)
    late = plain(lambda _, indices: [_window(row[1:], k) for k in indices], count)  # a negative control: one token off
    assert found != pytest.approx(late, rel=1e-3)


def _window(row: list[int], number: int) -> list[int]:
    return row[LENGTH * number : LENGTH * number + LENGTH + 1]


def test_random_windows_of_a_file_train_like_nanogpt_s_draws_under_the_seeds_of_the_samples(tmp_path: Path) -> None:
    numbers = np.random.RandomState(5).randint(0, VOCABULARY, 60).astype(np.uint16)
    numbers.tofile(tmp_path / "train.bin")
    file = str(tmp_path / "train.bin")
    run = trained(
        tmp_path, config_of({"_target_": "dist_train.data.Tokens", "tokens": file, "length": LENGTH, "random": True})
    )

    def windows(epoch: int, indices: list[int]) -> list[list[int]]:
        found = []
        for index in indices:
            seed_sample(0, epoch, index)
            start = int(torch.randint(len(numbers) - LENGTH, (1,)))
            found.append(numbers[start : start + LENGTH + 1].tolist())
        return found

    losses = plain(windows, (len(numbers) - 1) // LENGTH)
    assert [entry["loss"] for entry in rows(run, "train")] == pytest.approx(losses, rel=1e-12)
