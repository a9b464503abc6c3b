"""A connection is let go of when its association has ended, and no sooner; it is read when that has begun."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from pynetdicom import AE
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.association import Association

from dicom_node.collecting import Room
from dicom_node.listening import GuardedServer
from dicom_node.reactors import Reactor
from dicom_node.wire import GuardedMessages, GuardedProvider, Limits

LIMITS = Limits(16382, 30, 30, maximum_connections=4, maximum_connections_per_address=4)


class Late(threading.Event):
    """Says that a thread has begun when it is told to: the thread has lost the processor just before."""

    def __init__(self) -> None:
        super().__init__()
        self.is_reached, self.goes_on = threading.Event(), threading.Event()

    def set(self) -> None:
        self.is_reached.set()
        self.goes_on.wait(10)
        super().set()


@pytest.fixture
def server() -> Iterator[GuardedServer]:
    server = GuardedServer(AE(), ("127.0.0.1", 0), "NODE", [], None, limits=LIMITS)
    yield server
    server.server_close()


def test_an_association_whose_thread_is_just_beginning_has_not_ended(server, monkeypatch):
    monkeypatch.setattr(Association, "run_reactor", lambda self: None)  # it ends as soon as it has begun
    accepted, peer = socket.socketpair()
    association = Reactor(AE(), MODE_ACCEPTOR)
    association._started = late = Late()
    assert server.verify_request(accepted, ("192.0.2.1", 104))
    server.associated(accepted, association)
    starting = threading.Thread(target=association.start)
    starting.start()
    assert late.is_reached.wait(10)
    assert association.ident is not None  # the thread is there
    assert not association.is_alive()  # and has not said so yet

    server.reap()
    assert accepted.fileno() >= 0

    late.goes_on.set()
    starting.join(10)
    association.join(10)
    server.reap()
    assert accepted.fileno() < 0
    peer.close()


def test_a_request_that_comes_while_its_association_begins_is_not_left_to_pynetdicom(monkeypatch):
    accepted, peer = socket.socketpair()
    association = Reactor(AE(), MODE_ACCEPTOR)
    association.dul = provider = GuardedProvider(association)
    provider.connect(accepted, LIMITS, lambda *request: None)
    association.dimse = GuardedMessages(association, Room())
    provider.state_machine.current_state = "Sta6"  # accepted, and the association's thread is about to say so
    peer.sendall(b"\x04")

    def begins(_provider: GuardedProvider) -> bool:
        association.is_established = True  # a moment after it was asked
        return False

    monkeypatch.setattr(GuardedProvider, "_takes_messages", begins)
    monkeypatch.setattr(provider, "_read_pdu_data", lambda: pytest.fail("read by pynetdicom"))

    assert not provider._is_transport_event()
    for each in (accepted, peer):
        each.close()
