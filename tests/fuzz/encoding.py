"""PDUs and DIMSE messages by hand (PS3.8 Section 9.3, PS3.7 Section 6.3): also such as no library would write."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Sequence

from tests.datasets import CT, EXPLICIT, IMPLICIT

VERIFICATION = "1.2.840.10008.1.1"
COMMITMENT = "1.2.840.10008.1.20.1"
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
ECHO, STORE, BULK, PROMISE = 1, 3, 5, 7  # presentation context ids that `CONTEXTS` proposes
CONTEXTS = (
    (ECHO, VERIFICATION, IMPLICIT),
    (STORE, CT, EXPLICIT),
    (BULK, CT, IMPLICIT),
    (PROMISE, COMMITMENT, IMPLICIT),
)
LAST, COMMAND = 2, 1  # bits of a message control header (PS3.8 Annex E.2)

_FORMS = {2: "<H", 4: "<I"}


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def associate_rq(
    contexts: Iterable[tuple[int, str, str]] = CONTEXTS,
    *,
    calling: str = "FUZZER",
    called: str = "DICOM_NODE",
    maximum_length: int = 16384,
    user_items: bytes = b"",
) -> bytes:
    """Return an A-ASSOCIATE-RQ; `user_items` are appended to the User Information."""
    items = _item(0x10, b"1.2.840.10008.3.1.1.1")
    for number, abstract, syntax in contexts:
        proposed = _item(0x30, abstract.encode()) + _item(0x40, syntax.encode())
        items += _item(0x20, bytes([number, 0, 0, 0]) + proposed)
    user = _item(0x51, struct.pack(">I", maximum_length)) + _item(0x52, b"1.2.3.4") + user_items
    titles = called.encode().ljust(16)[:16] + calling.encode().ljust(16)[:16]
    body = struct.pack(">HH", 1, 0) + titles + b"\0" * 32 + items + _item(0x50, user)
    return struct.pack(">BBI", 1, 0, len(body)) + body


def role(uid: str, *, scu: int, scp: int) -> bytes:
    """Return an SCP/SCU Role Selection sub-item (PS3.7 Annex D.3.3.4)."""
    return _item(0x54, struct.pack(">H", len(uid)) + uid.encode() + bytes([scu, scp]))


def pdv(context: int, control: int, value: bytes, *, length: int | None = None) -> bytes:
    """Return a presentation data value; `length` is what its head claims."""
    return struct.pack(">IBB", len(value) + 2 if length is None else length, context, control) + value


def p_data(*pdvs: bytes, length: int | None = None) -> bytes:
    """Return a P-DATA-TF."""
    body = b"".join(pdvs)
    return struct.pack(">BBI", 4, 0, len(body) if length is None else length) + body


def element(tag: int, value: bytes | str | int, *, size: int = 2, length: int | None = None) -> bytes:
    """Return an element of a command set: implicit VR little endian."""
    if isinstance(value, int):
        value = struct.pack(_FORMS[size], value)
    if isinstance(value, str):
        value = value.encode() + b"\0" * (len(value) % 2)
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value) if length is None else length) + value


def command(*elements: bytes, group_length: int | None = None) -> bytes:
    """Return a command set with its group length."""
    body = b"".join(elements)
    return element(0x00000000, len(body) if group_length is None else group_length, size=4) + body


def store_rq(
    instance: str, *, number: int = 1, sop_class: str = CT, field: int = 0x0001, data_set: int = 0x0001
) -> tuple[bytes, ...]:
    """Return the elements of a C-STORE-RQ, in order."""
    return (
        element(0x00000002, sop_class),
        element(0x00000100, field),
        element(0x00000110, number),
        element(0x00000700, 2),
        element(0x00000800, data_set),
        element(0x00001000, instance),
    )


def fragments(context: int, data: bytes, size: int = 16370, *, of_command: bool = False) -> list[bytes]:
    """Return P-DATA-TFs of one PDV each."""
    pieces = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    kind = COMMAND if of_command else 0
    return [
        p_data(pdv(context, kind | (LAST if number == len(pieces) - 1 else 0), piece))
        for number, piece in enumerate(pieces)
    ]


def message(context: int, command_set: bytes, data: bytes | None = None, size: int = 16370) -> list[bytes]:
    """Return the P-DATA-TFs of a whole message."""
    return fragments(context, command_set, of_command=True) + ([] if data is None else fragments(context, data, size))


RELEASE_RQ = struct.pack(">BBII", 5, 0, 4, 0)
ABORT = struct.pack(">BBII", 7, 0, 4, 0)


class Silence(Exception):
    """The node neither answered nor hung up in the time that it has."""


class Connection:
    """A connection that says anything and listens."""

    def __init__(self, port: int, *, timeout: float = 8.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.timeout = timeout
        self.hung_up = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def associate(self, **options: object) -> int:
        """Send an A-ASSOCIATE-RQ; return the type of what is answered."""
        self.send([associate_rq(**options)])  # type: ignore[arg-type]
        answer = self.pdu()
        return answer[0] if answer else 0

    def send(self, pdus: Sequence[bytes]) -> None:
        """Send, as long as the node listens."""
        try:
            for pdu in pdus:
                self.socket.sendall(pdu)
        except OSError:
            self.hung_up = True

    def pdu(self, timeout: float | None = None) -> bytes:
        """Return the next PDU; empty where the node has hung up. Raises Silence."""
        self.socket.settimeout(self.timeout if timeout is None else timeout)
        head = self._exactly(6)
        return head + self._exactly(int.from_bytes(head[2:6], "big")) if len(head) == 6 else b""

    def _exactly(self, count: int) -> bytes:
        received = b""
        try:
            while len(received) < count:
                piece = self.socket.recv(count - len(received))
                if not piece:
                    break
                received += piece
        except TimeoutError:
            raise Silence from None
        except OSError:
            pass
        return received

    def statuses(self, count: int = 1) -> list[int]:
        """Return the statuses of so many responses, fewer where the association ended before."""
        found: list[int] = []
        while len(found) < count:
            pdu = self.pdu()
            if not pdu or pdu[0] != 4:
                break
            found += [status for status in [status_of(pdu)] if status is not None]
        return found

    def ending(self, *, seconds: float) -> str:
        """Return how it ended: `status`, `aborted`, `rejected`, `released` or `closed`; raise Silence where not."""
        deadline, seen = time.monotonic() + seconds, ""
        while True:
            try:
                pdu = self.pdu(timeout=max(0.01, deadline - time.monotonic()))
            except Silence:
                if seen:
                    return seen
                raise
            if not pdu:
                return seen or "closed"
            kind = {3: "rejected", 4: "status", 6: "released", 7: "aborted"}.get(pdu[0], "")
            if kind and kind != "status":
                return kind
            if kind:
                seen, deadline = "status", min(deadline, time.monotonic() + 0.3)


def status_of(pdu: bytes) -> int | None:
    """Return the Status (0000,0900) of the response in a P-DATA-TF of one PDV."""
    at = pdu.find(b"\x00\x00\x00\x09\x02\x00\x00\x00", 12)
    return int.from_bytes(pdu[at + 8 : at + 10], "little") if at > 0 else None


def store(connection: Connection, context: int, instance: str, data: bytes, number: int = 1) -> int:
    """Send one C-STORE; return its status, 0xFFFF where the association ended instead."""
    connection.send(message(context, command(*store_rq(instance, number=number)), data))
    return (connection.statuses() or [0xFFFF])[0]
