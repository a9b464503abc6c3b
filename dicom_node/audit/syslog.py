"""Syslog over TLS: the header of RFC 5424, the frame of RFC 5425, and a connection whose end is an acknowledgement.

Syslog acknowledges nothing. But a sender ends its connection with a close_notify, and the receiver may end its own
side only when it has read that (RFC 5425 Section 4.4), which is the last thing that there is to read. So messages go
out in batches, a connection each, and a batch has arrived when its connection has ended in that order.
"""

from __future__ import annotations

import fcntl
import socket
import ssl
import struct
import termios
from collections.abc import Sequence
from datetime import UTC, datetime

from dicom_node.errors import Unavailable

FACILITY = 10  # security/authorization messages, as PS3.15 A.6 has it
_NOTICE, _WARNING = 5, 4
_APP_NAME = "dicom-node"
_MSGID = "DICOM+RFC3881"
_BOM = b"\xef\xbb\xbf"
_CLOSE_WAIT, _ESTABLISHED = 8, 1  # of TCP, as Linux numbers its states
_CONNECT, _SEND, _FAREWELL = 10.0, 30.0, 10.0  # seconds


class CollectorUnavailable(Unavailable):
    """The audit collector cannot be reached, or has not read what it was sent."""


def record(xml: bytes, *, at: float, hostname: str, process: int, is_warning: bool) -> bytes:
    """Return a syslog message (RFC 5424): `at` in seconds since 1970, the XML as UTF-8 with its mark."""
    priority = FACILITY * 8 + (_WARNING if is_warning else _NOTICE)
    moment = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    name = "".join(letter for letter in hostname if "!" <= letter <= "~")[:255] or "-"
    return f"<{priority}>1 {moment} {name} {_APP_NAME} {process} {_MSGID} - ".encode() + _BOM + xml


def frame(message: bytes) -> bytes:
    """Return a message with its length before it (RFC 5425 Section 4.3)."""
    return b"%d %s" % (len(message), message)


def send(messages: Sequence[bytes], address: tuple[str, int], context: ssl.SSLContext, name: str) -> bool:
    """Send messages on a connection of their own; on return the collector has read them.

    Return False where it leaves the connection open: then its machine has them, and more cannot be known.

    Raises:
        CollectorUnavailable: it is away, is somebody else (`name` is whose certificate it must show), does not know
            us, or went away before it had read everything: all of the messages must be sent again.
    """
    try:
        with socket.create_connection(address, timeout=_CONNECT) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with context.wrap_socket(plain, server_hostname=name) as connection:
                connection.settimeout(_SEND)
                for message in messages:
                    connection.sendall(frame(message))
                connection.settimeout(_FAREWELL)
                return _ended(connection)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or type(error).__name__
        raise CollectorUnavailable(f"{address[0]}:{address[1]}: {reason}") from error


def _ended(connection: ssl.SSLSocket) -> bool:
    """Say goodbye and wait for the collector's own; raise OSError where it was not the answer to ours."""
    try:
        rest: socket.socket = connection.unwrap()
        while rest.recv(4096):
            pass
    except TimeoutError:
        if _state(connection) == _ESTABLISHED and _unacknowledged(connection) == 0:
            return False
        raise
    except ssl.SSLError as error:
        if not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise  # an alert: it refuses our certificate, and has read nothing
    except OSError as error:
        if error.errno:  # without a number: the connection ended without a close_notify
            raise
    # one that had gone before would not have acknowledged our last bytes, or would have reset the connection
    if _state(connection) != _CLOSE_WAIT or _unacknowledged(connection):
        raise ConnectionResetError("the collector has gone")
    return True


def _state(connection: socket.socket) -> int:
    return int(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])


def _unacknowledged(connection: socket.socket) -> int:
    """Return how many bytes the collector's machine has not acknowledged (tcp(7), SIOCOUTQ)."""
    return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])
