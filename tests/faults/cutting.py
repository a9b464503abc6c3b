"""A line that is cut: passes bytes on between the node and its destination, so many and no more."""

from __future__ import annotations

import contextlib
import socket
import threading


class CutLine:
    """Listens on a port of its own, passes on to `port`, and drops each connection after `limit` bytes."""

    def __init__(self, port: int, *, limit: int) -> None:
        self.limit = limit
        self._to = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                node, _ = self._server.accept()
                peer = socket.create_connection(("127.0.0.1", self._to))
                threading.Thread(target=self._pass, args=(peer, node, None), daemon=True).start()
                threading.Thread(target=self._pass, args=(node, peer, self.limit), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096 if limit is None else max(1, min(4096, limit))):
                target.sendall(data)
                if limit is not None:
                    limit -= len(data)
                    if limit <= 0:
                        self.cuts += 1
                        break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()
