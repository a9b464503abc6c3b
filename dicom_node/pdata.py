"""C-STORE requests straight from the connection to whoever takes them: PDUs are parsed in place, nothing is collected.

A message is looked at as far as its command. Where that is a C-STORE request as PS3.7 Section 9.3.1 has it, the data
set is read to where it goes to the disk from, and the response is sent at once. Everything else goes on to
pynetdicom untouched, byte for byte.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

from dicom_node import native
from dicom_node.landing import Filling, borrow, give_back
from dicom_node.services import SUCCESS, Answer

_P_DATA_TF = 0x04
_COMMAND, _LAST = 0x01, 0x02  # message control header (PS3.8 Annex E.2)
LONGEST_COMMAND = 1 << 16  # bytes, in however many fragments; a C-STORE request has some 200
_PIECE = 1 << 18  # bytes after which is looked at what has come, where fragments are read here and not in C
_PDU_HEAD = struct.Struct(">BxL")
_PDV_HEAD = struct.Struct(">LBB")
_ELEMENT = struct.Struct("<HHL")
_NUMBER, _GROUP_LENGTH = struct.Struct("<HHLH"), struct.Struct("<HHLL")  # elements with a value of US, of UL
_C_STORE_RSP, _NO_DATA_SET = _NUMBER.pack(0, 0x0100, 2, 0x8001), _NUMBER.pack(0, 0x0800, 2, 0x0101)  # PS3.7 Annex E.1


class StoreRequest(NamedTuple):
    """The command of a C-STORE (PS3.7 Table 9.3-1), as far as it is acted upon."""

    message_id: int
    affected_sop_class_uid: str
    affected_sop_instance_uid: str


class Taking(Filling, Protocol):
    """Takes one data set, in C or piece by piece; nothing of it raises."""

    def take(self, filling: Callable[[native.Plan], native.Taken]) -> native.Taken:
        """Have `filling` take all of it, and what follows, where that is possible; return how far it got.

        Where anything has landed, it is done with this one.
        """

    def answer(self, reply: native.Reply | None = None) -> Answer:
        """Return what to answer now that the data set is whole; `reply` says that all is well, and may be sent."""

    def abandon(self) -> None:
        """Forget it: there will be no more."""


class Broken(Exception):
    """The peer has gone, is too slow, or speaks no DICOM: the connection is of no more use."""


class Violation(Broken):
    """What came is not what PS3.8 allows to come here."""


def read_store_request(command: bytes) -> StoreRequest | None:
    """Return the request that a command set is; None where it is another, or one that is not understood."""
    elements: dict[int, bytes] = {}
    at, end, head = 0, len(command), _ELEMENT.unpack_from
    while at + 8 <= end:
        group, element, length = head(command, at)
        at += 8 + length
        if group or at > end:
            return None
        elements[element] = command[at - length : at]
    value = elements.get
    message_id = value(0x0110, b"")
    if value(0x0100) != b"\x01\x00" or value(0x0800) in (None, b"\x01\x01") or len(message_id) != 2 or at != end:
        return None
    try:
        sop_class_uid, sop_instance_uid = str(value(0x0002, b""), "ascii"), str(value(0x1000, b""), "ascii")
    except UnicodeDecodeError:
        return None
    message = int.from_bytes(message_id, "little")
    return StoreRequest(message, sop_class_uid.rstrip("\x00 "), sop_instance_uid.rstrip("\x00 "))


def response(context_id: int, request: StoreRequest, answer: Answer) -> bytes:
    """Return the C-STORE response as one P-DATA-TF (PS3.7 Table 9.3-2)."""
    elements = [
        _often(0x0002, request.affected_sop_class_uid),
        _C_STORE_RSP,
        _NUMBER.pack(0, 0x0120, 2, request.message_id),
        _NO_DATA_SET,
        _NUMBER.pack(0, 0x0900, 2, answer.status),
    ]
    if answer.offending_element is not None:
        tag = answer.offending_element
        elements.append(_element(0x0901, struct.pack("<HH", tag >> 16, tag & 0xFFFF)))
    if answer.comment:
        elements.append(_element(0x0902, answer.comment.encode("ascii", "replace"), b" "))
    elements.append(_element(0x1000, request.affected_sop_instance_uid.encode(), b"\x00"))
    body = b"".join(elements)
    head = _PDU_HEAD.pack(_P_DATA_TF, len(body) + 18) + _PDV_HEAD.pack(len(body) + 14, context_id, _COMMAND | _LAST)
    return head + _GROUP_LENGTH.pack(0, 0x0000, 4, len(body)) + body


def _element(element: int, value: bytes, padding: bytes = b"") -> bytes:
    value += padding * (len(value) % 2)
    return _ELEMENT.pack(0x0000, element, len(value)) + value


@lru_cache(maxsize=256)
def _often(element: int, uid: str) -> bytes:
    return _element(element, uid.encode(), b"\x00")


class Inflow:
    """Reads one connection while its association is established."""

    def __init__(
        self,
        connection: Any,
        *,
        longest_pdu: int,
        timeout: float,
        begin: Callable[[int, StoreRequest, memoryview], Taking | None],
        progressed: Callable[[], None] = lambda: None,
    ) -> None:
        """Read from `connection`, a socket that does not let a call wait for ever.

        `begin` is given the presentation context, the request, and memory that is its own until the request has been
        answered; it returns who takes the data set, or None where pynetdicom shall. `timeout` is what one PDU may
        take, in seconds; `progressed` is called after each.
        """
        self._connection = connection
        self._longest_pdu = longest_pdu
        self._timeout = timeout
        self._begin = begin
        self._progressed = progressed
        self._is_tls = isinstance(connection, ssl.SSLSocket)
        self._command_piece = memoryview(bytearray(LONGEST_COMMAND))
        self._flow: native.Flow | None = None
        if native.may_flow(connection):
            self._flow = native.Flow(connection, longest_pdu=longest_pdu, timeout=timeout, ahead=self._command_piece)
        self._answer = b""  # to the message before, to be sent before anything else
        self._ahead = b""  # of the next message, read already
        self._memory: memoryview | None = None  # from the first request on
        self._head = memoryview(bytearray(_PDU_HEAD.size + _PDV_HEAD.size))
        self._in_pdu = 0  # bytes of the present PDU that are still to be read
        self._deadline = 0.0

    def serve(self, *, linger: float, until: Callable[[], bool]) -> bytes:
        """Serve C-STORE requests for as long as one follows another within `linger` seconds, and not `until`.

        Returns what was read of a message that is not ours, to be read again by pynetdicom; empty where nothing came.
        Raises Broken where the connection is of no more use.
        """
        while True:
            if handed_on := self._message(linger):
                ahead, self._ahead = self._ahead, b""
                return handed_on + ahead
            if self._in_pdu or until():
                self._send()
                if not self._in_pdu:
                    ahead, self._ahead = self._ahead, b""
                    return ahead
            elif not self._ahead and not self._comes(linger):
                return b""

    def _message(self, linger: float) -> bytes:
        """Serve one message and those like it that follow, or return the beginning of one that is not ours."""
        if not self._in_pdu:
            head = self._read(_PDU_HEAD.size)
            pdu_type, length = _PDU_HEAD.unpack(head)
            if pdu_type != _P_DATA_TF or not _PDV_HEAD.size <= length <= self._longest_pdu:
                return head
            self._begin_pdu(length)
        read = bytearray(_PDU_HEAD.pack(_P_DATA_TF, self._in_pdu))  # what is left of a PDU is one that begins here
        context_id, command = self._command(read)
        request = read_store_request(command)
        taking = self._taking(context_id, request) if request else None
        if request is None or taking is None:
            self._in_pdu = 0
            return bytes(read)
        if self._flow is None:
            self._serve(context_id, request, taking, partial(self._data_set, context_id, taking))
        else:
            self._flowing(self._flow, context_id, command, request, taking, linger)
        return b""

    def _serve(self, context_id: int, request: StoreRequest, taking: Taking, fill: Callable[[], None]) -> None:
        """Have `fill` bring the data set to `taking`, and keep the answer until something is said."""
        try:
            fill()
        except BaseException:
            taking.abandon()
            raise
        reply = None if self._flow is None else native.Reply(self._connection, response(context_id, request, SUCCESS))
        answer = taking.answer(reply)
        if reply is None or not reply.is_sent:  # else the peer knows already
            self._answer = response(context_id, request, answer)

    def _taking(self, context_id: int, request: StoreRequest) -> Taking | None:
        if self._memory is None:
            self._memory = borrow()
        return self._begin(context_id, request, self._memory)

    def close(self) -> None:
        """Let others have the memory: there will be no more requests."""
        memory, self._memory = self._memory, None
        if memory is not None:
            give_back(memory)

    def _command(self, read: bytearray) -> tuple[int, bytes]:
        """Return the context of a command set and, where it is one, itself; put all that was read into `read`."""
        command, expected = bytearray(), -1
        while True:
            head = self._read(_PDV_HEAD.size if expected < 0 else self._next_head())
            read += head
            length, context_id, control = self._pdv(head)
            if control & ~_LAST != _COMMAND or expected not in (-1, context_id):
                return context_id, b""
            if length > self._in_pdu or len(read) + length > LONGEST_COMMAND:
                return context_id, b""
            piece = self._read(length)
            self._in_pdu -= length
            read += piece
            command += piece
            expected = context_id
            if control & _LAST:
                return context_id, bytes(command)

    def _data_set(self, context_id: int, taking: Taking) -> None:
        """Read a data set; its fragments come to lie side by side where `taking` wants them."""
        room, filled, head = taking.room(), 0, self._read(self._next_head())
        while head:
            left, found, control = self._pdv(head)
            if found != context_id or control & _COMMAND or left > self._in_pdu:
                raise Violation("no fragment of the data set where it goes on")
            self._in_pdu -= left
            while left > len(room) - filled:
                left -= len(room) - filled
                self._fill(room[filled:], self._head[:0])
                taking.took(len(room))
                room, filled = taking.room(), 0
            after = self._head[: 0 if control & _LAST else self._next_head()]
            self._fill(room[filled : filled + left], after)
            filled += left
            if filled >= _PIECE or (filled and not after):
                taking.took(filled)
                room, filled = taking.room(), 0
            head = bytes(after)

    def _flowing(
        self, flow: native.Flow, context_id: int, command: bytes, request: StoreRequest, taking: Taking, linger: float
    ) -> None:
        """Have C take a data set and those that follow; where it stops in the middle of one, bring that to its end."""
        flow.begin_data_set(context_id, self._in_pdu, self._deadline)
        try:
            taken = taking.take(partial(flow.take, command=command, linger=linger))
        except BaseException:
            taking.abandon()
            raise
        self._progressed()
        if taken.reason == native.LANDED:
            self._ahead = taken.ahead
            self._in_pdu = 0 if taken.ahead else flow.in_pdu
            return
        if taken.landed and taken.reason >= 0:
            request, taking = self._next(context_id, taken.ahead)
        self._serve(context_id, request, taking, partial(self._fragments, flow, taking, taken))

    def _next(self, context_id: int, ahead: bytes) -> tuple[StoreRequest, Taking]:
        """Return the request that C has gone on with, and who takes it now."""
        request = read_store_request(ahead[_PDU_HEAD.size + _PDV_HEAD.size :])
        taking = self._taking(context_id, request) if request else None
        if request is None or taking is None:
            raise Broken("the association is being closed")
        return request, taking

    def _fragments(self, flow: native.Flow, taking: Taking, taken: native.Taken) -> None:
        """Bring the rest of a data set to `taking`, as `_data_set` does, without a return to Python for each."""
        reason, filled = taken.reason, taken.filled
        while True:
            if reason == native.VIOLATION:
                raise Violation("no fragment of the data set where it goes on")
            if reason < 0:
                raise Broken("too slow" if reason == native.LATE else "the peer has gone")
            self._progressed()
            if filled:
                taking.took(filled)
            if reason == native.WHOLE:
                break
            reason, filled = flow.fragments(taking.room(), 0)
        self._in_pdu = flow.in_pdu

    def _next_head(self) -> int:
        """Return how long the head of the next fragment is: that of its PDU comes first where the present one ends."""
        return _PDV_HEAD.size if self._in_pdu else _PDU_HEAD.size + _PDV_HEAD.size

    def _pdv(self, head: bytes) -> tuple[int, int, int]:
        """Return the length of the value, the context and the control of the PDV that a head begins."""
        if len(head) > _PDV_HEAD.size:
            pdu_type, length = _PDU_HEAD.unpack_from(head)
            if pdu_type != _P_DATA_TF or not _PDV_HEAD.size <= length <= self._longest_pdu:
                raise Violation("no P-DATA-TF where the data set goes on")  # an A-ABORT, or a broken sender
            self._begin_pdu(length)
        length, context_id, control = _PDV_HEAD.unpack_from(head, len(head) - _PDV_HEAD.size)
        if self._in_pdu < _PDV_HEAD.size or length < 2:
            raise Violation("a PDV that is not all there")
        self._in_pdu -= _PDV_HEAD.size
        return length - 2, context_id, control

    def _begin_pdu(self, length: int) -> None:
        self._in_pdu = length
        self._deadline = time.monotonic() + self._timeout
        self._progressed()

    # -- the connection -------------------------------------------------------------------------------------

    def _read(self, length: int) -> bytes:
        ahead, self._ahead = self._ahead[:length], self._ahead[length:]
        if ahead:
            return ahead if len(ahead) == length else ahead + self._read(length - len(ahead))
        piece = self._command_piece[:length]
        self._fill(piece, self._head[:0])
        return bytes(piece)

    def _fill(self, piece: memoryview, after: memoryview) -> None:
        """Fill `piece` and then `after`; raise Broken where that takes too long or the peer has gone."""
        if not len(piece) + len(after):
            return  # an empty last fragment: the kernel would wait for a byte all the same
        try:
            if self._is_tls:
                self._fill_slowly(piece)
                self._fill_slowly(after)
                return
            # one call for the value of this PDV and the head of the next: the kernel puts them where they belong
            got = self._connection.recvmsg_into([piece, after], 0, socket.MSG_WAITALL)[0]
            if got < len(piece) + len(after):
                self._fill_slowly(piece[got:])
                self._fill_slowly(after[max(0, got - len(piece)) :])
        except OSError as error:
            raise Broken(type(error).__name__) from error

    def _fill_slowly(self, piece: memoryview) -> None:
        """Fill `piece` in as many calls as it takes."""
        while piece:
            if time.monotonic() > self._deadline > 0:
                raise Broken("too slow")
            got = self._connection.recv_into(piece)
            if not got:
                raise Broken("the peer has gone")
            piece = piece[got:]

    def _send(self) -> None:
        answer, self._answer = self._answer, b""
        try:
            self._connection.sendall(answer)
        except OSError as error:
            raise Broken(type(error).__name__) from error

    def _comes(self, seconds: float) -> bool:
        """Answer the message before; return whether another begins within `seconds`. Its beginning may be read then."""
        if self._flow is None:
            self._send()
            return self._is_readable(seconds)
        answer, self._answer = self._answer, b""
        beginning = self._flow.exchange(answer, seconds)
        if beginning is None:
            raise Broken("the peer has gone")
        self._ahead = beginning
        return bool(beginning)

    def _is_readable(self, seconds: float) -> bool:
        if self._is_tls and self._connection.pending():
            return True
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        return bool(waiting.poll(seconds * 1000))
