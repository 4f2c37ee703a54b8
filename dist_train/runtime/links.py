"""Messages between ranks of one machine by Unix sockets, between others by torch.distributed.

gloo hands every message to a thread of its own and back: on two busy cores a message takes 0.3 to 0.6 ms, over a socket of one's
own 0.05 (bench/RESULTS.md).
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from dist_train.runtime.world import World

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 64 << 10  # bytes; what both ends may have under way at once without waiting for each other
CREDENTIALS = struct.Struct("3i")


class Links:
    """This rank's ways to some others. Every rank must make one, naming those that name it.

    Raises (all methods): ``RuntimeError`` when the other end has gone.
    """

    def __init__(self, world: World, others: Collection[int]):
        self._sockets: dict[int, socket.socket] = {}
        if sys.platform == "linux":
            self._connect(world, others)

    def _connect(self, world: World, others: Collection[int]) -> None:
        """The higher rank of a pair calls the lower one, which succeeds on the same machine (and in the same container) only."""
        name = f"\0dist_train-{secrets.token_hex(16)}"  # abstract: no file, and seen in one network namespace only
        with socket.socket(socket.AF_UNIX) as ear:
            ear.bind(name)
            ear.listen(len(others) + 8)
            names = world.gather(name[1:])
            for other in others:
                if other < world.rank:
                    line = socket.socket(socket.AF_UNIX)
                    try:
                        line.connect("\0" + names[other])
                        line.sendall(struct.pack("i", world.rank))
                        self._sockets[other] = line
                    except OSError:
                        line.close()
            called = world.gather(list(self._sockets))
            expected = {rank for rank, whom in enumerate(called) if world.rank in whom}
            for rank, line in self._callers(ear, len(expected)):
                self._sockets[rank] = line
        for line in self._sockets.values():
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PIECE)

    @staticmethod
    def _callers(ear: socket.socket, count: int) -> Iterator[tuple[int, socket.socket]]:
        while count:
            line, _ = ear.accept()
            _, user, _ = CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
            if user != os.geteuid():
                line.close()  # a stranger
                continue
            yield struct.unpack("i", line.recv(4, socket.MSG_WAITALL))[0], line
            count -= 1

    def swap(self, mine: Tensor, theirs: Tensor, other: int) -> None:
        """Send `mine` to a rank that sends as much into `theirs`; both contiguous, on the CPU, of one shape and dtype."""
        import torch.distributed as dist

        line = self._sockets.get(other)
        if line is None:
            sending = dist.isend(mine, other)
            dist.recv(theirs, other)
            if sending is not None:
                sending.wait()
            return
        out, into = _bytes(mine), _bytes(theirs)
        for start in range(0, len(out), PIECE):
            self._put(line, out[start : start + PIECE], other)
            self._take(line, into[start : start + PIECE], other)

    def send(self, tensor: Tensor, other: int) -> None:
        """Send a contiguous tensor on the CPU to a rank that receives it."""
        import torch.distributed as dist

        line = self._sockets.get(other)
        if line is None:
            dist.send(tensor, other)
        else:
            self._put(line, _bytes(tensor), other)

    def receive(self, tensor: Tensor, other: int) -> None:
        """Fill a contiguous tensor on the CPU with what a rank sends."""
        import torch.distributed as dist

        line = self._sockets.get(other)
        if line is None:
            dist.recv(tensor, other)
        else:
            self._take(line, _bytes(tensor), other)

    @staticmethod
    def _put(line: socket.socket, data: memoryview, other: int) -> None:
        try:
            line.sendall(data)
        except OSError as error:
            raise RuntimeError(f"Connection closed by peer: rank {other} ({error})") from error

    @staticmethod
    def _take(line: socket.socket, data: memoryview, other: int) -> None:
        try:
            while data:
                got = line.recv_into(data)
                if not got:
                    raise ConnectionResetError("it has ended")
                data = data[got:]
        except OSError as error:
            raise RuntimeError(f"Connection closed by peer: rank {other} ({error})") from error

    def close(self) -> None:
        """Hang up; what is sent from now on goes by torch.distributed, if the others do the same."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
