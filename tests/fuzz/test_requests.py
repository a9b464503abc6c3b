"""What pynetdicom collects, as large and as odd as it comes: the right status, soon, and for little memory."""

from __future__ import annotations

import struct
import threading
import time
from contextlib import ExitStack

import pytest

from dicom_node.scp import Scp
from tests.datasets import ct, encoded
from tests.fuzz.conftest import Watched
from tests.fuzz.encoding import (
    COMMAND,
    COMMITMENT,
    COMMITMENT_INSTANCE,
    ECHO,
    LAST,
    PROMISE,
    STORE,
    Connection,
    associate_rq,
    command,
    element,
    fragments,
    message,
    p_data,
    pdv,
    store,
    store_rq,
)
from tests.fuzz.soak import started_node

SOON = 40.0  # seconds for what takes three, on a machine with other things to do
ITEM, OPEN_ITEM = b"\xfe\xff\x00\xe0", b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
OPEN_SEQUENCE = b"\x08\x00\x15\x11\xff\xff\xff\xff"
LARGEST = 16 << 20  # bytes of a request that are kept


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A node that takes instances larger than any request may be."""
    node = started_node(tmp_path_factory.mktemp("requests"))
    yield Watched(node)
    node.end()


def references(count: int) -> bytes:
    """Return the items of Referenced SOP Sequence, implicit VR little endian."""
    made = []
    for number in range(count):
        inside = element(0x00081150, "1.2.840.10008.5.1.4.1.1.2")
        inside += element(0x00081155, f"1.2.826.0.1.3680043.10.{number:08}")
        made.append(ITEM + struct.pack("<I", len(inside)) + inside)
    return b"".join(made)


def request(items: bytes, *, length: int | None = None) -> bytes:
    return element(0x00081195, "1.2.3") + element(0x00081199, items, length=length)


def n_service(field: int, data: bytes, context: int = PROMISE) -> list[bytes]:
    elements = [
        element(0x00000002 if field == 0x0100 else 0x00000003, COMMITMENT),
        element(0x00000100, field),
        element(0x00000110, 9),
        element(0x00000800, 1),
        element(0x00001000 if field == 0x0100 else 0x00001001, COMMITMENT_INSTANCE),
        element(0x00001002 if field == 0x0100 else 0x00001008, 1),
    ]
    return message(context, command(*elements), data, size=100_000)


def answered(port: int, pdus: list[bytes]) -> list[int]:
    with Connection(port, timeout=SOON) as connection:
        assert connection.associate() == 2
        connection.send(pdus)
        return connection.statuses()


REQUESTS = {
    "many": (lambda: request(references(100_000)), 0x0000),
    "too many": (lambda: request(references(100_001)), 0x0115),
    "empty items": (lambda: request((ITEM + bytes(4)) * 2_000_000), 0x0115),
    "deep": (lambda: request((OPEN_ITEM + OPEN_SEQUENCE) * 900_000, length=2**32 - 1), 0x0115),
    "an item that claims 4 GB": (lambda: request(ITEM + b"\xfe\xff\xff\xff" + bytes(100)), 0x0115),
    "a sequence that claims 4 GB": (lambda: request(references(3), length=2**32 - 2), 0x0115),
    "a UID of a megabyte": (lambda: element(0x00081195, "1" * 1_000_000) + request(references(3))[14:], 0x0115),
    "zeros": (lambda: bytes(LARGEST - 10), 0x0115),
    "nothing": (lambda: b"", 0x0115),
    "more than is taken": (lambda: request(references(1)) + bytes(LARGEST), 0x0213),
}
LONG = {"many", "too many", "deep"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in REQUESTS]
)
def test_a_request_for_commitment_is_answered_soon_and_for_little_memory(watched, name):
    make, status = REQUESTS[name]
    data, before = make(), watched.megabytes
    started = time.monotonic()

    assert answered(watched.port, n_service(0x0130, data)) == [status]
    assert time.monotonic() - started < SOON
    assert watched.megabytes - before < 250


@pytest.mark.parametrize("field", [0x0020, 0x0021, 0x0010, 0x0030, 0x0110, 0x0120, 0x0140, 0x0150])
def test_a_data_set_that_nobody_reads_is_not_kept(watched, field):
    before, most = watched.megabytes, 0.0
    with Connection(watched.port, timeout=SOON) as connection:
        assert connection.associate() == 2
        for piece in n_service(field, bytes(40 << 20), context=ECHO):
            connection.send([piece])
            most = max(most, watched.megabytes)

    assert most - before < 25


def test_requests_that_do_not_end_share_one_room_and_a_small_one_still_finds_some(watched):
    before = watched.megabytes
    with ExitStack() as held:
        for _ in range(20):
            connection = held.enter_context(Connection(watched.port, timeout=SOON))
            assert connection.associate() == 2
            connection.send(n_service(0x0130, bytes(LARGEST - 10))[:-1])
        assert watched.megabytes - before < 64 + 20 * 0.6 + 60
        assert answered(watched.port, n_service(0x0130, request(references(4000)))) == [0x0000]
    deadline = time.monotonic() + 20
    while (large := answered(watched.port, n_service(0x0130, request(references(20_000))))) != [0x0000]:
        assert time.monotonic() < deadline, "the room did not come back"
    assert large == [0x0000]


def _slowly(self, report):
    time.sleep(0.05)
    return False


def test_reports_that_nobody_waits_for_have_one_thread_for_each_association(receiving, monkeypatch):
    monkeypatch.setattr(Scp, "_reported", _slowly)
    port, most = receiving(), 0
    with Connection(port) as connection:
        assert connection.associate() == 2
        threads = threading.active_count()
        connection.send(n_service(0x0100, request(references(1))) * 40)
        for _ in range(40):
            assert connection.statuses() == [0x0115]
            most = max(most, threading.active_count())
    assert most <= threads + 2


def _late(self, event):
    time.sleep(0.5)


def _collected(self, event):
    raise AssertionError("a C-STORE was collected in memory")


def test_what_comes_before_the_node_knows_that_it_is_associated_is_not_collected(receiving, monkeypatch):
    monkeypatch.setattr(Scp, "_on_accepted", _late)
    monkeypatch.setattr(Scp, "_on_c_store", _collected)
    image = ct(1)
    with Connection(receiving()) as connection:
        assert connection.associate() == 2

        assert store(connection, STORE, image.SOPInstanceUID, encoded(image)) == 0x0000


def test_a_c_store_behind_an_echo_or_in_pieces_is_not_collected(receiving, monkeypatch):
    monkeypatch.setattr(Scp, "_on_c_store", _collected)
    image = ct(1)
    echo = element(0x00000002, "1.2.840.10008.1.1") + element(0x00000100, 0x0030) + element(0x00000110, 7)
    echo_rq = message(ECHO, command(echo + element(0x00000800, 0x0101)))
    pieces = fragments(STORE, command(*store_rq(image.SOPInstanceUID)), 20, of_command=True)
    whole = message(STORE, command(*store_rq(image.SOPInstanceUID, number=2)), encoded(image))
    with Connection(receiving()) as connection:
        connection.send([associate_rq()])
        assert connection.pdu()[0] == 2
        connection.send([b"".join([*echo_rq, *echo_rq, *whole, *pieces])])
        connection.send([p_data(pdv(STORE, LAST & ~COMMAND, encoded(image)))])

        assert connection.statuses(4) == [0x0000] * 4
