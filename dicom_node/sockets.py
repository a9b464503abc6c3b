"""Sockets as the node wants them, in both directions; a patch of pynetdicom.

pynetdicom asks `select`, which knows no descriptor above 1,023, and leaves a socket whose connection was never made to
the garbage collector.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import threading
from contextlib import suppress

from pynetdicom.transport import AssociationSocket

_closing = threading.Lock()


def limit_waits(connection: socket.socket, seconds: float) -> None:
    """Let no call on a connection wait longer than `seconds`.

    The kernel sees to it where it can: with a time-out of Python's own, every read asks twice.
    """
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        return
    connection.settimeout(None)
    interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, interval)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)


def hang_up(connection: socket.socket) -> None:
    """End a connection that another thread reads from, and will close.

    Python reads the descriptor, lets go of its lock, and then calls `shutdown`: if the other closed it meanwhile,
    its number could be that of a connection that has just been accepted.
    """
    with _closing, suppress(OSError):  # closed or not connected any more
        connection.shutdown(socket.SHUT_RDWR)


def close(connection: socket.socket) -> None:
    """Close a connection, whatever state it is in and whoever else closes it: both threads of an association may."""
    hang_up(connection)
    with _closing, suppress(OSError):
        connection.close()


def is_ready(self: AssociationSocket) -> bool:
    """Whether there is something to read, by `poll`: `select` refuses descriptors above 1,023."""
    connection = self.socket
    if connection is None or not self._is_connected:
        return False
    try:
        if isinstance(connection, ssl.SSLSocket) and connection.pending():
            return True
        waiting = select.poll()
        waiting.register(connection, select.POLLIN)
        return bool(waiting.poll(0))
    except (OSError, ValueError):
        self.event_queue.put("Evt17")  # transport connection closed
        return False


def _shutdown(self: AssociationSocket) -> None:
    if self.socket is not None:
        close(self.socket)


def amend() -> None:
    """Have pynetdicom's own sockets, of associations that the node requests, ask `poll` and close; once or often."""
    AssociationSocket._shutdown_socket = _shutdown  # type: ignore[method-assign]
    AssociationSocket.ready = property(is_ready)  # type: ignore[assignment, method-assign]
