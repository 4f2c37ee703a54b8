"""The parts of bench/gpu_check about `distributed.reproducibility: bitwise`: the same bits on one GPU over different splits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpu_runs import Findings, project, said
from torch import Tensor, nn

from dist_train.data.plan import leaf_shares
from dist_train.reduction.tree import Exchange, Node, Partials, TreeSum

LEAVES, ROWS = 8, 16


def gradients(net: nn.Module, batch: tuple[Tensor, Tensor], precision: torch.dtype | None) -> Tensor:
    """All gradients of a micro-batch, one after the other."""
    inputs, labels = batch
    with torch.autocast(inputs.device.type, precision, enabled=precision is not None):
        loss = nn.functional.cross_entropy(net(inputs), labels)
    found = torch.autograd.grad(loss, list(net.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in found])


def exchanged(rounds: Sequence[list[Exchange]]) -> None:
    """The messages of one round, by copies."""
    sent = {(rank, one.peer): [t.clone() for t in one.send] for rank, of in enumerate(rounds) for one in of}
    for rank, messages in enumerate(rounds):
        for message in messages:
            for room, tensor in zip(message.receive, sent[message.peer, rank], strict=True):
                room.copy_(tensor)


def over_ranks(micro_batches: Sequence[Tensor], ranks: int) -> list[Tensor]:
    """What each of so many ranks has after the reduction of these leaves."""
    size = len(micro_batches[0])
    trees = [TreeSum(rank, ranks, LEAVES, size, micro_batches[0]) for rank in range(ranks)]
    for tree, share in zip(trees, leaf_shares(LEAVES, ranks), strict=True):
        partials = Partials(LEAVES)
        for leaf in share:
            partials.add(Node(0, leaf), [micro_batches[leaf].clone()])
        for node, room in zip(tree.nodes, tree.mine, strict=True):
            room.copy_(partials.by_node[node][0])
    for rounds in zip(*(tree.rounds() for tree in trees), strict=True):
        exchanged(rounds)
    return [tree.total for tree in trees]


def same(first: Tensor, *others: Tensor) -> bool:
    """Bit by bit."""
    return all(torch.equal(first.view(torch.int32), other.view(torch.int32)) for other in others)


def splits(device: torch.device) -> Findings:
    """Gradients of this device summed as by one rank and as by several, in one process; another order must differ."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)]
    net = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 12 * 12, 10)).to(device)
    batches = [
        (torch.randn(ROWS, 3, 16, 16, device=device), torch.randint(0, 10, (ROWS,), device=device))
        for _ in range(LEAVES)
    ]
    for precision in (None, torch.bfloat16):
        leaves = [gradients(net, batch, precision) for batch in batches]
        again = [gradients(net, batch, precision) for batch in reversed(batches)][::-1]
        finding: dict[str, Any] = {"precision": str(precision or torch.float32)}
        repeats = all(map(same, leaves, again))
        yield {"what": "a micro-batch has the same gradient again", **finding, "ok": repeats}
        alone = over_ranks(leaves, 1)[0]
        for ranks in (2, 3, 4, 5, 7, 8):
            yield {"what": "as by one rank", "ranks": ranks, **finding, "ok": same(alone, *over_ranks(again, ranks))}
        in_a_row = sum(leaves[1:], leaves[0])
        close = torch.allclose(in_a_row, alone, rtol=1e-3, atol=1e-4)
        yield {"what": "another order differs", **finding, "ok": close and not same(alone, in_a_row)}
    torch.use_deterministic_algorithms(False)


def ranks(device: torch.device) -> Findings:
    """Runs on one, two and three ranks that share the device (over gloo); another micro-batch size must differ."""
    given = [
        f"distributed.device={device.type}", "distributed.reproducibility=bitwise", "model._target_=user.Mixed",
        "trainer.ema_decay=0.9", "trainer.clip_grad_norm=0.5", "distributed.bucket_mb=0.02",
    ]  # fmt: skip
    cases = {"fp32": ["trainer.micro_batch_size=8"], "bf16": ["trainer.micro_batch_size=8", "trainer.precision=bf16"]}
    other = [*given, "run.name=other", "trainer.micro_batch_size=16"]
    with project() as (place, python):
        for count in (1, 2, 3):
            jobs = [[*given, *options, f"run.name={name}-{count}"] for name, options in cases.items()]
            done = python(*launcher(count), "two.py", json.dumps([*jobs, other] if count == 1 else jobs))
            if done.returncode:
                yield {"what": "runs", "ranks": count, "rc": done.returncode, "said": said(done), "ok": False}
                return

        def bits(name: str) -> tuple[str, list[dict[str, Any]]]:
            rows = (place / f"runs/{name}/metrics.jsonl").read_text().splitlines()
            values = [{k: v for k, v in json.loads(row).items() if k in KEPT} for row in rows]
            return json.loads((place / f"runs/{name}/result.json").read_text())["weights_sha256"], values

        for name in cases:
            alone, two, three = (bits(f"{name}-{count}") for count in (1, 2, 3))
            yield {"what": "weights and rows of one rank", "precision": name, "ok": alone == two == three}
        yield {"what": "another micro-batch size differs", "ok": bits("other")[0] != bits("fp32-1")[0]}


KEPT = ("step", "split", "loss", "grad_norm", "lr")


def launcher(count: int) -> Iterator[str]:
    """Arguments of the interpreter that start so many ranks of a script."""
    if count > 1:
        yield from ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
