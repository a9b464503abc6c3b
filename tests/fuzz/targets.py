"""What reads bytes from outside, one function each, for fuzzers that look at coverage; and what they begin with.

A target returns, or raises what it declares; anything else is a defect.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

from pynetdicom.pdu import A_ASSOCIATE_RQ

from dicom_node import native
from dicom_node.attributes import read_attributes
from dicom_node.commitment import (
    Malformed,
    Reference,
    Report,
    Request,
    read_report,
    read_request,
    report_dataset,
    request_dataset,
)
from dicom_node.errors import InputRefused, InvalidInstance
from dicom_node.header import read_beginning, read_header
from dicom_node.part10 import dataset_digest, preamble, read_origin
from dicom_node.pdata import Broken, Inflow, StoreRequest
from dicom_node.services import Answer
from tests.datasets import BIG_ENDIAN, CT, DEFLATED, EXPLICIT, IMPLICIT, ct, encoded, uid
from tests.fuzz.encoding import STORE, associate_rq, command, element, message, p_data, pdv, role, store_rq
from tests.fuzz.files import items, part10
from tests.fuzz.mutation import nested

_SYNTAXES = (EXPLICIT, IMPLICIT, BIG_ENDIAN, DEFLATED)
_LONGEST = 60_000  # bytes: a pair of sockets holds as many
_USER = b"\x58\0\0\x0a\1\1\0\4user\0\0"  # User Identity sub-item (PS3.7 Annex D.3.3.7)
_INSTANCE = uid("study", "series", 1)
_FILE = Path(tempfile.gettempdir()) / f"dicom-node-fuzz-{os.getpid()}.dcm"


_ROOM = memoryview(bytearray(1000))


class _Taken:
    """Takes data sets, and counts."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, filling: object) -> native.Taken:
        return native.Taken(native.PROGRESS)

    def room(self) -> memoryview:
        return _ROOM

    def took(self, number: int) -> None:
        assert 0 < number <= len(_ROOM)
        self.size += number

    def answer(self, reply: object = None) -> Answer:
        return Answer(0x0000)

    def abandon(self) -> None:
        pass


def pdata(data: bytes) -> None:
    """P-DATA-TFs as they come on an association; what is handed on is a part of what came, or begins a PDU anew."""
    ours, theirs = socket.socketpair()
    taken = _Taken()
    with ours, theirs:
        ours.settimeout(2.0)
        theirs.sendall(data[:_LONGEST])
        theirs.shutdown(socket.SHUT_WR)
        inflow = Inflow(ours, longest_pdu=1 << 15, timeout=2.0, begin=lambda *asked: _taking(taken, asked[1]))
        with suppress(Broken):
            handed_on = inflow.serve(linger=0.0, until=lambda: False)
            assert len(handed_on) <= len(data) + 6
    assert taken.size <= len(data)


def _taking(taken: _Taken, request: StoreRequest) -> _Taken | None:
    return taken if request.affected_sop_class_uid else None


def header(data: bytes) -> None:
    """A data set; its first byte says in which transfer syntax."""
    syntax, content = _SYNTAXES[(data[0] if data else 0) % len(_SYNTAXES)], data[1:]
    with suppress(InvalidInstance):
        read_header(content, syntax)
    with suppress(InvalidInstance):
        read_beginning(memoryview(content), syntax)


def associate(data: bytes) -> None:
    """An A-ASSOCIATE-RQ; pynetdicom raises what it likes, and the association is aborted."""
    request = A_ASSOCIATE_RQ()
    with suppress(Exception):
        request.decode(data)
        request.to_primitive()


def commitment(data: bytes) -> None:
    """The data set of a request or a report; its first byte says whether it has VRs."""
    for read in (read_request, read_report):
        with suppress(Malformed):
            read(data[1:], is_implicit=bool(data[:1] and data[0] % 2))


def file(data: bytes) -> None:
    """A Part 10 file."""
    for read in (read_origin, partial(dataset_digest, like="0" * 32), partial(dataset_digest, like="0" * 64)):
        with suppress(ValueError):
            read(BytesIO(data))
    _FILE.write_bytes(data)
    try:
        with suppress(InputRefused):
            read_attributes(_FILE)
    finally:
        _FILE.unlink()


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "pdata": pdata,
    "header": header,
    "associate": associate,
    "commitment": commitment,
    "part10": file,
}


def seeds(target: str) -> list[bytes]:
    """Return what is well-formed, and what is nearly so."""
    references = (Reference(CT, "1.2.3.4"), Reference(CT, "1.2.3.5"))
    asked = request_dataset(Request("1.2.3", references))
    said = report_dataset(Report("1.2.3", references[:1], {references[1]: 0x0112}))
    whole = {syntax: encoded(ct(1), syntax) for syntax in _SYNTAXES}
    store = command(*store_rq(_INSTANCE))
    return {
        "pdata": [
            b"".join(message(STORE, store, whole[EXPLICIT], size=size)) for size in (100, 16370)
        ] + [
            b"".join(p_data(pdv(STORE, 1, store[at : at + 20])) for at in range(0, 120, 20)),
            b"".join(message(STORE, command(element(0x00000100, 0x0030), element(0x00000110, 1))))
            + p_data(pdv(STORE, 3, store), pdv(STORE, 0, whole[EXPLICIT][:50]), pdv(STORE, 2, b"")),
        ],
        "header": [
            *(bytes([number]) + whole[syntax] for number, syntax in enumerate(_SYNTAXES)),
            b"\0" + nested(5),
            b"\0" + items(3),
        ],
        "associate": [associate_rq(), associate_rq(user_items=role(CT, scu=1, scp=1) + _USER)],
        "commitment": [
            bytes([syntax == IMPLICIT]) + encoded(dataset, syntax)
            for dataset in (asked, said)
            for syntax in (EXPLICIT, IMPLICIT)
        ],
        "part10": [
            part10(whole[EXPLICIT]),
            part10(whole[DEFLATED], DEFLATED),
            part10(whole[BIG_ENDIAN], BIG_ENDIAN),
            preamble(CT, _INSTANCE, EXPLICIT, "SCANNER") + whole[EXPLICIT],
        ],
    }[target]  # fmt: skip
