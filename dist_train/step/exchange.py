"""Messages between ranks of one machine by Unix sockets, between others by torch.distributed.

gloo hands every message to a thread of its own and back: on two busy cores a message takes 0.3 to 0.6 ms, over a socket of one's
own 0.05 (bench/RESULTS.md).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Collection
from typing import TYPE_CHECKING

from dist_train.runtime.world import World
from dist_train.watch.processes import machine

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 64 << 10  # bytes; what both ends may have under way at once without waiting for each other
PATIENCE = 5.0  # seconds for one's partner to call, or to answer


class Links:
    """This rank's ways to some others. Every rank must make one, naming those that name it.

    Raises (all methods): ``RuntimeError`` when the other end has gone.
    """

    def __init__(self, world: World, others: Collection[int]):
        self._sockets: dict[int, socket.socket] = {}
        if sys.platform == "linux":
            self._connect(world, others)

    def _connect(self, world: World, others: Collection[int]) -> None:
        """The higher rank of a pair on one machine calls the lower one. What doesn't answer in time goes by torch.distributed.

        Each listens in a directory that nobody else may enter, and is called by way of that directory's descriptor: whatever
        TMPDIR is, an address has 108 bytes only.
        """
        with contextlib.ExitStack() as stack:
            ear, folder = _listen(stack, len(others) + 8)
            places = world.all_gather([machine(), os.getpid(), folder])
            for other in others:
                host, pid, theirs = places[other]
                if other < world.rank and host == machine() and theirs is not None:
                    self._call(f"/proc/{pid}/fd/{theirs}/ear", other, world.rank)
            called = world.all_gather(list(self._sockets))
            for _ in range(sum(world.rank in whom for whom in called)):
                self._answer(ear)
            agreed = world.all_gather(list(self._sockets))
        for other in [other for other in self._sockets if world.rank not in agreed[other]]:
            self._sockets.pop(other).close()  # one end alone has it
        for line in self._sockets.values():
            line.settimeout(None)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PIECE)

    def _call(self, address: str, other: int, rank: int) -> None:
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(PATIENCE)
        try:
            line.connect(address)
            line.sendall(struct.pack("i", rank))
            self._sockets[other] = line
        except OSError:
            line.close()

    def _answer(self, ear: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error):
            line, _ = ear.accept()
            line.settimeout(PATIENCE)
            self._sockets[struct.unpack("i", line.recv(4, socket.MSG_WAITALL))[0]] = line

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


def _listen(stack: contextlib.ExitStack, backlog: int) -> tuple[socket.socket, int | None]:
    """A socket that listens at `ear` in a directory of its own, until `stack` closes; the directory's descriptor, if any."""
    ear = stack.enter_context(socket.socket(socket.AF_UNIX))
    ear.settimeout(PATIENCE)
    try:
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="dist_train-", ignore_cleanup_errors=True))
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY)
        stack.callback(os.close, folder)
        ear.bind(f"/proc/self/fd/{folder}/ear")
        ear.listen(backlog)
    except OSError:  # no room, or a file system without sockets
        return ear, None
    return ear, folder


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
