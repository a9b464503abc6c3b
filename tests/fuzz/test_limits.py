"""A crowd on the port of a real node: more descriptors than `select` knows, limits that let in when one has gone."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from dicom_node.commitment import Reference
from tests.acceptance.stand import NodeProcess, free_port, wait_for
from tests.datasets import CT, ct, encoded
from tests.fuzz.conftest import Watched
from tests.fuzz.encoding import STORE, Connection, associate_rq, store
from tests.integration.test_commitment import Modality, stored

pytestmark = pytest.mark.slow  # two minutes on a busy machine

PEERS, OF_EACH = 26, 20
CROWD = PEERS * OF_EACH  # associations; each has two descriptors
IN_ALL = CROWD + 30
SELECTS = 1024  # the descriptors that `select` knows

_SETTINGS = f"""[receive]
minimum_free_megabytes = 10
association_timeout = 4
network_timeout = 250
maximum_associations = {IN_ALL}
maximum_associations_per_peer = {OF_EACH}
maximum_connections_per_address = 2000
[commitment]
same_association_after = 0.2
"""
PERMANENT, TRANSIENT = (
    1,
    2,
)  # result; source 3 is the service provider (presentation), reason 2 a local limit (PS3.8 9.3.4)
TOO_MANY = bytes([TRANSIENT, 3, 2])


@pytest.fixture(scope="module")
def many():
    """Lets this process have 8,000 descriptors; a node sees to that itself."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 8000:
        pytest.skip(f"no more than {before[1]} descriptors allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (8000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def _started(folder, modality: int, settings: str) -> Watched:
    node = NodeProcess(folder / "node", pacs_port=modality)
    text = node.settings_path.read_text().replace("[receive]\nminimum_free_megabytes = 10\n", settings)
    text = text.partition("[[route]]")[0].replace("ORTHANC", "MODALITY")
    node.settings_path.write_text(text)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, allowed[1]))  # as systemd and most shells have it
    try:
        return Watched(node.start())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


@pytest.fixture(scope="module")
def modality():
    one = Modality()
    yield one
    one.server.shutdown()


@pytest.fixture(scope="module")
def crowded(many, modality, tmp_path_factory):
    """A node with so many associations open that new sockets have high numbers."""
    node = _started(tmp_path_factory.mktemp("crowd"), modality.port, _SETTINGS)
    with ExitStack() as held:
        for number in range(CROWD):
            connection = held.enter_context(Connection(node.port, timeout=30))
            assert connection.associate(calling=f"PEER {number // OF_EACH}") == 2
        assert highest(node) > SELECTS
        yield node
    node.node.end()


def highest(node: Watched) -> int:
    return max(int(name) for name in os.listdir(f"/proc/{node.node.process.pid}/fd"))


def let_in(port: int, calling: str) -> bytes:
    """Return the type of the answer to an A-ASSOCIATE-RQ and, of a rejection, why; the connection is given up."""
    with Connection(port, timeout=30) as connection:
        connection.send([associate_rq(calling=calling)])
        answer = connection.pdu()
        return answer[:1] + (answer[7:10] if answer[:1] == b"\x03" else b"")


def sent(port: int, number: int) -> float:
    """Have one instance stored; return how many seconds that took."""
    started, image = time.monotonic(), ct(number, study="limits")
    with Connection(port, timeout=30) as connection:
        assert connection.associate(calling="HONEST") == 2
        assert store(connection, STORE, image.SOPInstanceUID, encoded(image)) == 0x0000
    return time.monotonic() - started


def test_the_next_sender_is_served(crowded):
    assert sent(crowded.port, 1) < 20
    assert crowded.node.answers()


def test_a_report_goes_out_on_a_new_association(crowded, modality):
    association = modality.associate(crowded.port)
    stored(association, 1)
    modality.ask(association, Reference(CT, ct(1).SOPInstanceUID))
    association.release()

    wait_for("a report on a new association", lambda: modality.reports, seconds=30)
    assert modality.reports[0][0] == "new"


def test_a_peer_has_no_more_than_its_share_and_comes_in_again_when_one_of_it_has_gone(crowded):
    assert let_in(crowded.port, "PEER 3") == b"\x03" + TOO_MANY
    with ExitStack() as held:
        mine = [held.enter_context(Connection(crowded.port, timeout=30)) for _ in range(OF_EACH)]
        assert [connection.associate(calling="GREEDY") for connection in mine] == [2] * OF_EACH
        assert let_in(crowded.port, "GREEDY") == b"\x03" + TOO_MANY
        assert let_in(crowded.port, "ANOTHER") == b"\x02"

        mine[0].socket.close()
        wait_for("one more", lambda: let_in(crowded.port, "GREEDY") == b"\x02", seconds=20)


def test_where_all_places_are_taken_the_next_is_told_and_comes_in_when_one_has_gone(crowded):
    wait_for("earlier tests to be over", lambda: let_in(crowded.port, "FIRST") == b"\x02", seconds=20)
    with ExitStack() as held:
        last: list[Connection] = []
        for number in range(60):
            last.append(held.enter_context(Connection(crowded.port, timeout=30)))
            if last[-1].associate(calling=f"FILLS {number % 10}") == 3:
                break
        assert 3 <= len(last) <= 31
        assert let_in(crowded.port, "LATE") == b"\x03" + TOO_MANY

        last[0].socket.close()
        wait_for("one more", lambda: let_in(crowded.port, "LATE") == b"\x02", seconds=20)


def test_who_sends_a_byte_at_a_time_is_cut_off_and_holds_up_nobody(crowded):
    request = associate_rq()
    with ExitStack() as held:
        slow = [held.enter_context(Connection(crowded.port, timeout=30)) for _ in range(10)]
        started, waits = time.monotonic(), []
        for number in range(len(request)):
            for connection in slow:
                connection.send([request[number : number + 1]])
            waits.append(sent(crowded.port, 100 + number) if number % 10 == 0 else 0.0)
            if all(connection.hung_up for connection in slow):
                break
            time.sleep(0.25)

        assert all(connection.hung_up for connection in slow)
        assert time.monotonic() - started < 30
        assert max(waits) < 10


_OUTGOING = """
import socket, sys
held = [socket.socket() for _ in range(1100)]
from dicom_node.config import DeliveryTable, Peer
from dicom_node.delivery import cstore
peer = Peer(ae_title="DICOM_NODE", host="127.0.0.1", port=int(sys.argv[1]))
cstore.echo(peer, ae_title="SENDER", timing=DeliveryTable())
print("answered with", held[-1].fileno())
"""


def test_a_process_that_only_sends_can_have_as_many(crowded):
    done = subprocess.run(
        [sys.executable, "-c", _OUTGOING, str(crowded.port)], capture_output=True, text=True, timeout=60
    )

    assert done.stdout.startswith("answered with 11"), done.stderr


@pytest.mark.timeout(900)
def test_fifteen_hundred_associations_are_held_and_let_go(many, tmp_path):
    settings = _SETTINGS.replace(str(IN_ALL), "1700").replace(f"_per_peer = {OF_EACH}", "_per_peer = 1700")
    settings = settings.replace("association_timeout = 4", "association_timeout = 60")
    node = _started(tmp_path, free_port(), settings)
    threads, descriptors = node.threads, node.descriptors
    try:
        with ExitStack() as held:
            for _ in range(1500):
                assert held.enter_context(Connection(node.port, timeout=60)).associate() == 2
            assert node.descriptors > 3000
            assert sent(node.port, 1) < 20
        node.settle(threads=threads, descriptors=descriptors, seconds=30)
        assert sent(node.port, 2) < 20
        assert "Traceback" not in node.node.log()
    finally:
        node.node.end()
