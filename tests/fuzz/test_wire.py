"""Whatever comes in on the port: the answer is a status or an abort, and the node is as it was."""

from __future__ import annotations

import random
import resource
import socket
import struct
import threading
import time

import pytest

from tests.fuzz.mutation import mutated, nested, record

ROUNDS = 400
MAY_GROW = 80  # MB: what an allocator keeps; a leak grows with the rounds


def push(port: int, pdus: list[bytes], *, patience: float = 0.05) -> bytes:
    """Send PDUs on a connection of their own; return what is answered within `patience` seconds of silence."""
    answered = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            for pdu in pdus:
                connection.sendall(pdu)
            connection.settimeout(patience)
            while piece := connection.recv(65536):
                answered += piece
        except OSError:
            pass  # it has hung up, or says nothing: either is an answer
    return answered


def closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.fixture
def as_before(watched):
    """After the test: the next association is accepted at once, nothing is held that was not, nothing was printed."""
    threads, descriptors = watched.threads, watched.descriptors
    yield watched
    started = time.monotonic()
    assert watched.node.answers()
    assert time.monotonic() - started < 2.0
    watched.settle(threads=threads, descriptors=descriptors)
    assert "Traceback" not in watched.node.log()
    assert ".defect" not in watched.node.log()


def fuzz(watched, *, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    recording = record(watched.port)
    for number in range(rounds):
        push(watched.port, mutated(recording, chance))
        if number % 50 == 0:
            assert watched.node.answers(), f"round {number} of seed {seed}"


def test_mutations_of_real_associations_leave_no_trace(as_before):
    fuzz(as_before, rounds=60, seed=1)
    before = as_before.megabytes

    fuzz(as_before, rounds=ROUNDS, seed=int(time.time()))

    assert as_before.megabytes - before < MAY_GROW


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_mutations_for_a_long_time_leave_no_trace(as_before):
    fuzz(as_before, rounds=200, seed=1)
    before, until = as_before.megabytes, time.monotonic() + 1800
    while time.monotonic() < until:
        fuzz(as_before, rounds=ROUNDS, seed=time.time_ns())

    assert as_before.megabytes - before < MAY_GROW


@pytest.mark.parametrize("pdu_type", range(1, 8))
def test_a_pdu_that_claims_four_gigabytes_is_refused_at_once_and_costs_nothing(as_before, pdu_type):
    before = as_before.megabytes
    with socket.create_connection(("127.0.0.1", as_before.port), timeout=5) as connection:
        connection.sendall(struct.pack(">BBI", pdu_type, 0, 0xFFFFFFFF) + b"\0" * 100)

        assert closed_within(connection, 2.0)

    assert as_before.megabytes - before < 20


def test_a_pdu_longer_than_was_agreed_is_aborted(as_before):
    request = record(as_before.port)[0]
    with socket.create_connection(("127.0.0.1", as_before.port), timeout=5) as connection:
        connection.sendall(request)
        assert connection.recv(1) == b"\x02"
        connection.sendall(struct.pack(">BBI", 4, 0, 200_000))
        rest = b""
        while piece := connection.recv(65536):
            rest += piece

    assert b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x06" in rest


def test_a_command_set_that_does_not_end_ends_the_association(as_before):
    request = record(as_before.port)[0]
    fragment = struct.pack(">BBIIBB", 4, 0, 60_006, 60_002, 1, 1) + b"\0" * 60_000
    with socket.create_connection(("127.0.0.1", as_before.port), timeout=5) as connection:
        connection.sendall(request)
        try:
            for _ in range(5):
                connection.sendall(fragment)
        except OSError:
            pass

        assert closed_within(connection, 3.0)


def test_an_instance_that_is_too_large_is_answered_and_never_in_memory(as_before):
    from pynetdicom import AE

    from tests.datasets import CT, EXPLICIT, as_file, ct

    large = ct(77)
    large.add_new(0x00091001, "OB", b"\0" * (200 << 20))
    entity = AE(ae_title="LARGE")
    entity.add_requested_context(CT, EXPLICIT)
    before, peak, done = as_before.megabytes, [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], as_before.megabytes)

    thread = threading.Thread(target=watch)
    thread.start()
    association = entity.associate("127.0.0.1", as_before.port)
    answer = association.send_c_store(as_file(large, EXPLICIT))
    association.release()
    done.set()
    thread.join()

    assert answer.Status == 0xA700
    assert "maximum_instance_megabytes" in answer.ErrorComment
    assert peak[0] - before < 60


def test_sequences_ten_thousand_deep_are_answered(as_before):
    from io import BytesIO

    from pynetdicom import AE
    from pynetdicom.dimse_primitives import C_STORE

    from tests.datasets import CT, EXPLICIT

    entity = AE(ae_title="DEEP")
    entity.add_requested_context(CT, EXPLICIT)
    association = entity.associate("127.0.0.1", as_before.port)
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = CT, "1.2.3"
    request.DataSet = BytesIO(nested(10_000))
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.001)
    association.dimse.send_msg(request, 1)
    _, answer = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    association.release()

    assert answer.Status in (0xC000, 0xA900)


@pytest.mark.parametrize("beginning", [b"", b"\x01", b"\x01\x00\x00\x00\x01\x00", b"\x16\x03\x01\x02"])
def test_who_connects_and_says_nothing_more_is_let_go(as_before, beginning):
    with socket.create_connection(("127.0.0.1", as_before.port), timeout=5) as connection:
        connection.sendall(beginning)

        assert closed_within(connection, 9.0)


def test_a_byte_a_second_is_too_slow(as_before):
    request = record(as_before.port)[0]
    with socket.create_connection(("127.0.0.1", as_before.port), timeout=5) as connection:
        started = time.monotonic()
        try:
            for byte in request:
                connection.sendall(bytes([byte]))
                time.sleep(0.25)
        except OSError:
            pass

        assert time.monotonic() - started < 8.0


def test_an_association_that_does_nothing_is_ended(as_before):
    request = record(as_before.port)[0]
    with socket.create_connection(("127.0.0.1", as_before.port), timeout=5) as connection:
        connection.sendall(request)
        assert connection.recv(1) == b"\x02"

        assert closed_within(connection, 9.0)


def test_one_address_cannot_have_every_connection_and_the_next_is_served_when_they_go(as_before):
    time.sleep(1.0)  # the association that the test before this one released is counted until its threads have ended
    held = [socket.create_connection(("127.0.0.1", as_before.port), timeout=5) for _ in range(80)]
    refused: set[int] = set()
    deadline = time.monotonic() + 2.5  # before those that stay have been silent for too long
    while len(refused) < 20 and time.monotonic() < deadline:
        refused |= {connection.fileno() for connection in held if closed_within(connection, 0.005)}
    for connection in held:
        connection.close()

    assert len(refused) == 20


def test_a_sender_that_does_not_wait_for_its_answers_does_not_fill_the_memory(as_before):
    recording = record(as_before.port)
    request, store = recording[0], b"".join(recording[2:4])
    before = as_before.megabytes
    with socket.create_connection(("127.0.0.1", as_before.port), timeout=2) as connection:
        connection.sendall(request)
        try:
            for _ in range(2000):
                connection.sendall(store)
        except OSError:
            pass

    assert as_before.megabytes - before < 60


def test_more_than_1024_descriptors(tmp_path, receiver_in_process):
    """pynetdicom's select would refuse them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"no more than {hard} descriptors allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2000, hard))
    held = [socket.socket() for _ in range(1100)]
    try:
        assert max(one.fileno() for one in held) > 1024
        assert receiver_in_process() == 0x0000
    finally:
        for one in held:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
