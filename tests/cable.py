"""A network that fails between a client and a real server."""

from __future__ import annotations

import contextlib
import socket
import threading


class Cable:
    """A TCP relay that can be cut: connections are reset and new ones refused until it is healed."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._open: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.budget: int | None = None
        """Bytes that may still go to the server before the cable cuts itself."""
        self.port = 0
        self.heal()

    @property
    def url(self) -> str:
        """Where a client finds the server through this cable."""
        return f"http://127.0.0.1:{self.port}"

    def heal(self) -> None:
        """Let connections through (on the same port as before)."""
        self.budget = None
        if self._listener is not None:
            return  # a slow machine: it has not been cut yet
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Reset all connections and refuse new ones."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for end in self._open:
            _end(end)
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open += [client, server]
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        try:
            while data := source.recv(65536):
                if counts and self.budget is not None:
                    self.budget -= len(data)
                    if self.budget < 0:
                        self.cut()
                        return
                target.sendall(data)
        except OSError:
            return
        finally:
            _end(source)
            _end(target)


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
