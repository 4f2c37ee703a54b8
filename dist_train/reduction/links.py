"""Messages between two ranks: over Unix sockets on one machine's CPU, else by torch.distributed.

gloo passes every message through a thread of its own: on two busy cores a message takes 0.3 to 0.6 ms, over a socket 0.05
(bench/RESULTS.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from dist_train.reduction.tree import Exchange
from dist_train.watch.processes import machine

if TYPE_CHECKING:
    from dist_train.runtime.world import World

CHUNK = 64 << 10  # bytes that both ends may have in flight without waiting for each other
TIMEOUT = 5.0  # seconds for a peer to connect


class Links:
    """This rank's connections to some others. Every rank must make one, naming those that name it."""

    def __init__(self, world: World, peers: Collection[int]):
        self._sockets: dict[int, socket.socket] = {}
        # gloo's send and recv take host memory only; on CUDA it is the backend where ranks share a GPU, which NCCL refuses.
        self._through_host = world.device.type == "cuda" and "nccl" not in torch.distributed.get_backend_config()
        if sys.platform == "linux" and world.device.type == "cpu":
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

    def run(self, messages: Collection[Exchange]) -> None:
        """Send and receive; on CUDA in the current stream, which waits, not the host.

        Raises:
            RuntimeError: a peer has gone.
        """
        distant = [message for message in messages if message.peer not in self._sockets]
        sent = [_on_host(message) for message in distant] if self._through_host else distant
        works = torch.distributed.batch_isend_irecv(_operations(sent)) if sent else []
        for message in messages:
            if message.peer in self._sockets:
                self._exchange(message)
        for work in works:
            work.wait()
        if self._through_host:
            for message, copy in zip(distant, sent, strict=True):
                torch._foreach_copy_(message.receive, copy.receive)

    def _exchange(self, message: Exchange) -> None:
        line = self._sockets[message.peer]
        try:
            for outgoing, incoming in message.memory:
                for start in range(0, max(len(outgoing), len(incoming)), CHUNK):
                    if start < len(outgoing):  # sending nothing fails where the peer, already done, has closed its end
                        line.sendall(outgoing[start : start + CHUNK])
                    _fill(incoming[start : start + CHUNK], line)
        except OSError as error:
            raise RuntimeError(f"Connection closed by peer: rank {message.peer} ({error})") from error

    def close(self) -> None:
        """Close the sockets; later messages go through torch.distributed, if the peers do the same."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def _on_host(message: Exchange) -> Exchange:
    """With copies of what is sent, and memory for what comes."""
    send = [tensor.to("cpu", copy=True) for tensor in message.send]
    return Exchange(message.peer, send, [torch.empty_like(tensor, device="cpu") for tensor in message.receive])


def _operations(messages: Collection[Exchange]) -> list[torch.distributed.P2POp]:
    return [
        torch.distributed.P2POp(how, tensor, message.peer)
        for message in messages
        for how, tensors in (
            (torch.distributed.isend, message.send),
            (torch.distributed.irecv, message.receive),
        )
        for tensor in tensors
    ]


def _fill(data: memoryview, line: socket.socket) -> None:
    while data:
        received = line.recv_into(data)
        if not received:
            raise ConnectionResetError("end of stream")
        data = data[received:]
