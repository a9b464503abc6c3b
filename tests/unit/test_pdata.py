"""C-STORE straight from a connection: every way to cut a data set into PDVs and PDUs, and all that is not ours."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pynetdicom.dimse_messages import C_STORE_RSP
from pynetdicom.dsutils import encode
from pynetdicom.pdu import P_DATA_TF

from dicom_node import native
from dicom_node.native import Reply
from dicom_node.pdata import Broken, Inflow, StoreRequest, Violation, read_store_request, response
from dicom_node.services import Answer
from dicom_node.sockets import limit_waits

pytestmark = pytest.mark.usefixtures("either_way")
CT = "1.2.840.10008.5.1.4.1.1.2"
REQUEST = StoreRequest(7, CT, "1.2.3.4")
CONTEXT = 5


def command_set(request: StoreRequest, **changes: int) -> bytes:
    """Return a command set as pynetdicom encodes it."""
    command = Dataset()
    command.AffectedSOPClassUID = request.affected_sop_class_uid
    command.CommandField = 0x0001
    command.MessageID = request.message_id
    command.Priority = 2
    command.CommandDataSetType = 0x0001
    command.AffectedSOPInstanceUID = request.affected_sop_instance_uid
    for keyword, value in changes.items():
        setattr(command, keyword, value)
    command.CommandGroupLength = len(encode(command, True, True))
    return bytes(encode(command, True, True))


COMMAND = command_set(REQUEST)


class Taken:
    """Takes data sets, and remembers them."""

    def __init__(self, status: int = 0x0000, room: int = 1 << 16) -> None:
        self.status = status
        self._room = memoryview(bytearray(room))
        self.pieces: list[bytes] = []
        self.whole: list[bytes] = []
        self.abandoned = 0

    def take(self, filling: object) -> native.Taken:
        return native.Taken(native.PROGRESS)

    def room(self) -> memoryview:
        return self._room

    def took(self, number: int) -> None:
        self.pieces.append(bytes(self._room[:number]))

    def answer(self, reply: Reply | None = None) -> Answer:
        self.whole.append(b"".join(self.pieces))
        self.pieces = []
        return Answer(self.status, "why not" if self.status else "", 0x00080018 if self.status else None)

    def abandon(self) -> None:
        self.abandoned += 1


def pdv(control: int, value: bytes, context: int = CONTEXT) -> bytes:
    return struct.pack(">LBB", len(value) + 2, context, control) + value


def pdu(*pdvs: bytes, pdu_type: int = 4) -> bytes:
    body = b"".join(pdvs)
    return struct.pack(">BxL", pdu_type, len(body)) + body


def served(sent: bytes, taken: Taken, *, longest_pdu: int = 1 << 17, timeout: float = 5.0) -> tuple[bytes, bytes]:
    """Send bytes to an inflow; return what it handed on, and what it answered."""
    ours, theirs = socket.socketpair()
    limit_waits(ours, timeout)
    with ours, theirs:
        sender = threading.Thread(target=lambda: (theirs.sendall(sent), theirs.shutdown(socket.SHUT_WR)))
        sender.start()
        inflow = Inflow(ours, longest_pdu=longest_pdu, timeout=timeout, begin=lambda context, request, memory: taken)
        try:
            handed_on = inflow.serve(linger=0.05, until=lambda: False)
        except Broken as error:
            if isinstance(error, Violation) or not taken.whole:
                raise
            handed_on = b""  # all was served, and then the sender went
        finally:
            sender.join()
        theirs.settimeout(0.2)
        answered = b""
        try:
            ours.shutdown(socket.SHUT_WR)
            while piece := theirs.recv(65536):
                answered += piece
        except OSError:
            pass
    return handed_on, answered


def answers(content: bytes) -> list[Dataset]:
    """Read C-STORE responses as pynetdicom does."""
    found = []
    while content:
        (length,) = struct.unpack_from(">L", content, 2)
        read = P_DATA_TF()
        read.decode(content[: 6 + length])
        content = content[6 + length :]
        message = C_STORE_RSP()
        message.decode_msg(read.to_primitive())
        found.append(message.command_set)
    return found


def test_a_request_is_read_as_pydicom_reads_it():
    assert read_store_request(COMMAND) == REQUEST


@pytest.mark.parametrize("cut", [1, 7, 20, len(COMMAND) - 1])
def test_a_command_that_is_cut_off_is_not_understood(cut):
    assert read_store_request(COMMAND[:cut]) is None


@pytest.mark.parametrize(
    "changes", [{"CommandField": 0x0030}, {"CommandDataSetType": 0x0101}, {"CommandField": 0x8001}]
)
def test_another_command_is_not_ours(changes):
    assert read_store_request(command_set(REQUEST, **changes)) is None


@pytest.mark.parametrize("status", [0x0000, 0xA700, 0xC000])
def test_a_response_is_what_pynetdicom_reads(status):
    comment, element = ("The disk is full", 0x00080016) if status else ("", None)

    (read,) = answers(response(CONTEXT, REQUEST, Answer(status, comment, element)))

    assert (read.CommandField, read.MessageIDBeingRespondedTo, read.Status) == (0x8001, 7, status)
    assert (read.AffectedSOPClassUID, read.AffectedSOPInstanceUID) == (CT, "1.2.3.4")
    assert read.get("ErrorComment") == (comment or None)
    assert read.get("OffendingElement") == element


DATA = bytes(range(256)) * 4000  # more than a megabyte


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, len(DATA)), max_size=12),
    together=st.lists(st.booleans(), min_size=14, max_size=14),
    with_command=st.booleans(),
    room=st.sampled_from([4097, 1 << 18, 1 << 20, 1 << 21]),
)
def test_however_a_data_set_is_cut_it_is_taken_whole(cuts, together, with_command, room):
    edges = [0, *sorted(cuts), len(DATA)]
    fragments = [DATA[a:b] for a, b in itertools.pairwise(edges)]
    values = [pdv(0 if n < len(fragments) - 1 else 2, value) for n, value in enumerate(fragments)]
    groups: list[list[bytes]] = [[pdv(3, COMMAND)]]
    for value, joined in zip(values, [with_command, *together], strict=False):
        if joined:
            groups[-1].append(value)
        else:
            groups.append([value])
    taken = Taken(room=room)

    handed_on, answered = served(b"".join(pdu(*group) for group in groups), taken, longest_pdu=1 << 22)

    assert handed_on == b""
    assert taken.whole == [DATA]
    assert [read.Status for read in answers(answered)] == [0x0000]


def test_one_request_after_another_is_served_and_answered_in_order():
    one = pdu(pdv(3, COMMAND)) + pdu(pdv(0, b"a" * 1000)) + pdu(pdv(2, b"b"))
    taken = Taken(0xA700)

    _, answered = served(one * 3, taken)

    assert taken.whole == [b"a" * 1000 + b"b"] * 3
    assert [(read.Status, read.ErrorComment) for read in answers(answered)] == [(0xA700, "why not")] * 3


ECHO = command_set(REQUEST, CommandField=0x0030, CommandDataSetType=0x0101)


@pytest.mark.parametrize(
    "sent",
    [
        pdu(pdv(3, ECHO)),
        pdu(pdv(1, ECHO[:40])) + pdu(pdv(1, b""), pdv(3, ECHO[40:])) + pdu(pdv(2, b"data")),
        pdu(pdv(1, COMMAND[:40]), pdv(2, b"data")),
        pdu(pdv(1, COMMAND[:40]), pdv(3, COMMAND[40:], context=9)),
        pdu(*[pdv(1, b"")] * 12_000) + pdu(pdv(3, COMMAND)),
        pdu(pdv(2, b"data without a command")),
        pdu(pdv(3, b"garbage")),
        pdu(b"\0\0\0\0", pdu_type=5),
        pdu(b"\0\0\2\0", pdu_type=7),
        struct.pack(">BxL", 4, 1 << 31),
    ],
    ids=[
        "echo",
        "another command in pieces",
        "command broken off",
        "command in two contexts",
        "command without end",
        "no command",
        "garbage",
        "release",
        "abort",
        "too long",
    ],
)
def test_what_is_not_ours_is_handed_on_byte_for_byte(sent):
    taken = Taken()
    ours, theirs = socket.socketpair()
    limit_waits(ours, 5)
    with ours, theirs:
        theirs.sendall(sent)
        inflow = Inflow(ours, longest_pdu=1 << 17, timeout=5, begin=lambda context, request, memory: taken)

        handed_on = inflow.serve(linger=0.05, until=lambda: False)

        rest = b""
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            rest = ours.recv(1 << 20)
    assert handed_on
    assert handed_on + rest == sent
    assert not taken.whole


@pytest.mark.parametrize("size", [1, 13, 100])
def test_a_command_in_pieces_is_taken_as_one_that_is_whole(size):
    pieces = [COMMAND[at : at + size] for at in range(0, len(COMMAND), size)]
    fragments = [pdv(1 if n < len(pieces) - 1 else 3, piece) for n, piece in enumerate(pieces)]
    sent = pdu(*fragments[:3]) + b"".join(pdu(each) for each in fragments[3:]) + pdu(pdv(2, b"data"), pdv(3, ECHO))

    handed_on, answered = served(sent, taken := Taken())

    assert taken.whole == [b"data"]
    assert [read.Status for read in answers(answered)] == [0x0000]
    assert handed_on == pdu(pdv(3, ECHO))


def test_what_follows_in_the_same_pdu_is_handed_on_as_one_that_begins_there():
    whole = pdu(pdv(3, COMMAND), pdv(2, b"data"), pdv(3, ECHO))

    handed_on, _ = served(whole, taken := Taken())

    assert taken.whole == [b"data"]
    assert handed_on == pdu(pdv(3, ECHO))


def test_a_context_that_was_not_accepted_is_handed_on():
    sent = pdu(pdv(3, COMMAND)) + pdu(pdv(2, b"data"))
    ours, theirs = socket.socketpair()
    limit_waits(ours, 5)
    with ours, theirs:
        theirs.sendall(sent)
        inflow = Inflow(ours, longest_pdu=1 << 17, timeout=5, begin=lambda context, request, memory: None)

        handed_on = inflow.serve(linger=0.05, until=lambda: False)

        assert handed_on + ours.recv(1 << 20) == sent


@pytest.mark.parametrize(
    "sent",
    [
        pdu(pdv(0, b"data")) + pdu(b"\0\0\0\0", pdu_type=7),
        pdu(pdv(0, b"data")) + pdu(pdv(2, b"data", context=9)),
        pdu(pdv(0, b"data")) + pdu(pdv(3, COMMAND)),
        pdu(pdv(0, b"data")) + struct.pack(">BxLLBB", 4, 6, 1 << 20, CONTEXT, 2),
        pdu(pdv(0, b"data")) + struct.pack(">BxLLBB", 4, 6, 0, CONTEXT, 2),
        pdu(pdv(0, b"data"), b"\0\0\0"),
        pdu(pdv(0, b"data")) + struct.pack(">BxL", 4, 1 << 30) + pdv(2, b"x"),
    ],
    ids=["abort", "another context", "a command", "longer than its pdu", "no length", "a rest", "a pdu too long"],
)
def test_what_cannot_come_within_a_data_set_ends_it(sent):
    taken = Taken()

    with pytest.raises(Broken):
        served(pdu(pdv(3, COMMAND)) + sent, taken)

    assert not taken.whole
    assert taken.abandoned == 1


@pytest.mark.parametrize("cut", [3, 10, 60, 150, -1])
def test_a_sender_that_goes_in_the_middle_leaves_nothing(cut):
    whole = pdu(pdv(3, COMMAND)) + pdu(pdv(0, b"a" * 150)) + pdu(pdv(2, b"b" * 100))
    taken = Taken()

    with pytest.raises(Broken):
        served(whole[:cut], taken)

    assert not taken.whole


def test_a_sender_that_stops_in_the_middle_is_not_waited_for():
    ours, theirs = socket.socketpair()
    limit_waits(ours, 0.3)
    with ours, theirs:
        theirs.sendall(pdu(pdv(3, COMMAND)) + pdu(pdv(0, b"a" * 150))[:-1])
        taken = Taken()
        inflow = Inflow(ours, longest_pdu=1 << 17, timeout=0.3, begin=lambda context, request, memory: taken)

        with pytest.raises(Broken):
            inflow.serve(linger=0.05, until=lambda: False)

    assert taken.abandoned == 1
