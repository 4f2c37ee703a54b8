"""The gradients of a small model on the CPU, summed pair by pair: over Unix sockets on one machine, else by torch.distributed.

gloo passes every message through a thread of its own: on two busy cores a message takes 0.3 to 0.6 ms, over a socket 0.05
(bench/RESULTS.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_train.step.objective import Item, Objective, SingleProcess, StepSums, check_all_used, step_sums
from dist_train.watch.processes import machine
from dist_train.watch.status import BACKWARD, status

if TYPE_CHECKING:
    from dist_train.runtime.world import World

MAX_BYTES = 2**20  # of gradients in one bucket; DDP's own first bucket has this size
CHUNK = 64 << 10  # bytes that both ends may have in flight without waiting for each other
TIMEOUT = 5.0  # seconds for a peer to connect


class Links:
    """This rank's connections to some others. Every rank must make one, naming those that name it."""

    def __init__(self, world: World, peers: Collection[int]):
        self._sockets: dict[int, socket.socket] = {}
        if sys.platform == "linux":
            self._connect(world, peers)

    def _connect(self, world: World, peers: Collection[int]) -> None:
        """Of a pair on one machine the higher rank connects to the lower; without a connection torch.distributed is used.

        Each listens at an abstract address, which needs no file, and both ends accept the process id of their peer only.
        """
        with socket.socket(socket.AF_UNIX) as listener:
            listener.settimeout(TIMEOUT)
            listener.bind("")  # the kernel chooses a free abstract address
            listener.listen(len(peers) + 8)
            places = world.all_gather([machine(), os.getpid(), listener.getsockname().hex()])
            rank_of = {pid: rank for rank, (host, pid, _) in enumerate(places) if host == machine()}
            for peer in peers:
                host, _, address = places[peer]
                if peer < world.rank and host == machine():
                    with contextlib.suppress(OSError):
                        line = socket.socket(socket.AF_UNIX)
                        line.settimeout(TIMEOUT)
                        line.connect(bytes.fromhex(address))
                        self._keep(line, rank_of)
            connected = world.all_gather(list(self._sockets))
            for _ in range(sum(world.rank in theirs for theirs in connected)):
                with contextlib.suppress(OSError):
                    self._keep(listener.accept()[0], rank_of)
        agreed = world.all_gather(list(self._sockets))
        for peer in [peer for peer in self._sockets if world.rank not in agreed[peer]]:
            self._sockets.pop(peer).close()  # the other end doesn't have it
        for line in self._sockets.values():
            line.settimeout(None)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * CHUNK)

    def _keep(self, line: socket.socket, rank_of: dict[int, int]) -> None:
        pid, _, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if pid in rank_of:
            self._sockets[rank_of[pid]] = line
        else:
            line.close()

    def exchange(self, peer: int, *, send: Tensor | None = None, receive: Tensor | None = None) -> None:
        """Send one tensor to `peer`, which receives it, and fill another with what it sends; contiguous, on the CPU.

        Raises:
            RuntimeError: the peer has gone.
        """
        line = self._sockets.get(peer)
        if line is None:
            sending = None if send is None else torch.distributed.isend(send, peer)
            if receive is not None:
                torch.distributed.recv(receive, peer)
            if sending is not None:
                sending.wait()
            return
        outgoing, incoming = _bytes(send), _bytes(receive)
        try:
            for start in range(0, max(len(outgoing), len(incoming)), CHUNK):
                if start < len(outgoing):  # sending nothing fails where the peer, already done, has closed its end
                    line.sendall(outgoing[start : start + CHUNK])
                _fill(incoming[start : start + CHUNK], line)
        except OSError as error:
            raise RuntimeError(f"Connection closed by peer: rank {peer} ({error})") from error

    def close(self) -> None:
        """Close the sockets; later messages go through torch.distributed, if the peers do the same."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def _fill(data: memoryview, line: socket.socket) -> None:
    while data:
        received = line.recv_into(data)
        if not received:
            raise ConnectionResetError("end of stream")
        data = data[received:]


def _bytes(tensor: Tensor | None) -> memoryview:
    array: Any = b"" if tensor is None else tensor.numpy()
    return memoryview(array).cast("B")


class OneBucket(SingleProcess):
    """Gradients that fit one bucket, on the CPU: summed on each rank, then over the ranks, pair by pair.

    DDP too would reduce them all after the last backward, so there is nothing to overlap, and gloo's all-reduce, a ring of many
    small messages, takes most of a small model's step (bench/RESULTS.md). Here each of log2(ranks) rounds is one message to and
    one from another rank (recursive doubling: Thakur, Rabenseifner and Gropp 2005), and a rank without samples sends zeros.
    a + b has the bits of b + a, so all ranks get the same sums, from the first step on.
    """

    def __init__(self, objective: Objective, world: World):
        super().__init__(objective)
        self.rank, self.world_size = world.rank, world.size
        self.power = 1 << (world.size.bit_length() - 1)  # ranks below this power of two take part in all rounds
        self.partner = self.rank ^ self.power  # across that border, if there is such a rank
        peers = [self.rank ^ distance for distance in self._distances()]
        self.links = Links(world, [peer for peer in (*peers, self.partner) if peer < world.size])
        self.trained = objective.trained()
        self.parameters = list(self.trained.values())
        sizes = [parameter.numel() for parameter in self.parameters]
        reported = 2 + 2 * len(objective.terms or ())  # weight and loss sum, then (sum, weight) of each named loss
        self.bucket = torch.zeros(sum(sizes) + reported, dtype=self.parameters[0].dtype)
        self.received = torch.empty_like(self.bucket)
        *parts, self.report = self.bucket.split([*sizes, reported])
        self.views = [_with_strides(part, parameter) for part, parameter in zip(parts, self.parameters, strict=True)]

    def forward_backward(self, item: Item, *, scale: float, zero_weight: bool, last: bool) -> None:
        if not zero_weight:
            super().forward_backward(item, scale=scale, zero_weight=False, last=last)

    @torch.no_grad()
    def finish(self) -> StepSums:
        status.phase = BACKWARD
        status.busy += time.perf_counter() - status.began  # from here on the ranks wait for each other
        if self._loss is None:
            self.bucket.zero_()
        else:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            if len(gradients) < len(self.views):
                check_all_used(self.trained)
            torch._foreach_copy_(self.views, gradients)
            sums = super().finish()
            self.report[0], self.report[1] = sums.weight, sums.loss
            if sums.terms is not None:
                self.report[2:] = sums.terms.view(-1)
        self._sum_over_ranks()
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view
        return step_sums(self.report.clone())

    def close(self) -> None:
        self.links.close()

    def _distances(self) -> list[int]:
        rounds = self.power.bit_length() - 1 if self.rank < self.power else 0
        return [1 << number for number in range(rounds)]

    def _sum_over_ranks(self) -> None:
        """The bucket becomes the sum over all ranks. Ranks beyond the power of two send theirs to a partner, and get the sum."""
        exchange, bucket, paired = self.links.exchange, self.bucket, self.partner < self.world_size
        if self.rank >= self.power:
            exchange(self.partner, send=bucket)
            exchange(self.partner, receive=bucket)
            return
        if paired:
            exchange(self.partner, receive=self.received)
            bucket += self.received
        for distance in self._distances():
            exchange(self.rank ^ distance, send=bucket, receive=self.received)
            bucket += self.received
        if paired:
            exchange(self.partner, send=bucket)


def _with_strides(part: Tensor, parameter: Tensor) -> Tensor:
    """A view of `part` with the parameter's strides: fused optimizers follow memory order, not indices."""
    return part.as_strided(parameter.shape, torch.empty_like(parameter).stride(), part.storage_offset())


def fits_one_bucket(objective: Objective, bucket_mb: float) -> bool:
    """Whether the gradients are on the CPU, dense, of one dtype and small."""
    parameters = objective.trained().values()
    kinds = {(parameter.device.type, parameter.dtype) for parameter in parameters}
    return (
        kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})
        and sum(parameter.nbytes for parameter in parameters) <= min(bucket_mb * 2**20, MAX_BYTES)
        and not any(getattr(module, "sparse", False) for module in objective.modules.modules())
    )
