"""What guards the wire: connections, PDUs and messages that cost the node nothing, whoever sends them.

pynetdicom trusts its peers. It waits for as many bytes as a PDU header claims for as long as that takes, keeps
messages without end in memory, starts a thread for every report, and leaves sockets to the garbage collector. The
classes here stand in the places that it offers for its own.
"""

from __future__ import annotations

import itertools
import math
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import structlog
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.dimse_primitives import C_CANCEL, N_EVENT_REPORT
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket

from dicom_node import proposals, sockets, turns
from dicom_node.collecting import Collected, Room
from dicom_node.pdata import LONGEST_COMMAND, Broken, Inflow, StoreRequest, Taking, Violation
from dicom_node.reactors import Announced, Provider, Reactor
from dicom_node.sockets import close, is_ready, limit_waits

log = structlog.get_logger()

_A_ASSOCIATE_RQ, _P_DATA_TF = 0x01, 0x04  # PDU types (PS3.8 Section 9.3.1)
_LARGEST_REQUEST = 1 << 20  # bytes of an A-ASSOCIATE-RQ; 128 contexts with every syntax there is need 200 kB
_LARGEST_OTHER = 1 << 16  # bytes of any other PDU but P-DATA-TF
_SLACK = 1024  # bytes by which a sender may have miscounted its P-DATA-TF
_PIECE = 1 << 18
_A_ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x06"  # by the service provider: invalid PDU parameter (PS3.8 9.3.8)
_GLANCE = 0.05  # seconds, after which who waits for an answer looks whether the association has ended
_LINGER = 0.02  # seconds for the next request of a series to come, before the thread looks at anything else


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection, one message and one address may cost; seconds and bytes."""

    maximum_pdu_length: int
    association_timeout: float  # from the connection to the whole A-ASSOCIATE-RQ, TLS included
    network_timeout: float  # for one PDU, and for a send that nobody reads
    maximum_connections: int
    maximum_connections_per_address: int

    def longest(self, pdu_type: int) -> int:
        """Return how long the rest of a PDU of this type may be, in bytes."""
        if pdu_type == _P_DATA_TF:
            return self.maximum_pdu_length + _SLACK
        return _LARGEST_REQUEST if pdu_type == _A_ASSOCIATE_RQ else _LARGEST_OTHER


Store = Callable[[Association, int, StoreRequest, memoryview], Taking | None]
"""Says who takes a C-STORE request that came in a presentation context; None: pynetdicom."""


class GuardedSocket(AssociationSocket):
    """A connection whose peer has a limited time for each PDU, and a limited length."""

    def __init__(self, association: Association, client: socket.socket, limits: Limits) -> None:
        """Wrap an accepted `client`."""
        super().__init__(association, client_socket=client)
        self._limits = limits
        self._head = b""
        self._handed_on = b""
        limit_waits(client, limits.network_timeout)
        self._client = client

    @property
    def may_be_read(self) -> bool:
        """Whether it is open, and nothing that came before still waits to be looked at."""
        is_open = self.socket is not None and self.socket.fileno() >= 0
        return is_open and not cast(Any, self.assoc.dul).is_to_wait

    @property
    def ready(self) -> bool:
        """Whether there is something to read, and room for it."""
        return self.may_be_read and (bool(self._handed_on) or is_ready(self))

    @property
    def has_been_handed_on(self) -> bool:
        """Whether something that was read already is to be read again."""
        return bool(self._handed_on)

    def hand_on(self, content: bytes) -> None:
        """Let what was read already be read again."""
        self._handed_on = content

    def recv(self, nr_bytes: int) -> bytearray:
        """Return the next bytes of a PDU: its head of six, then the rest.

        Raises OSError where the rest is longer than it may be, or does not come in time.
        """
        if self.socket is None:
            raise ConnectionAbortedError
        is_rest = len(self._head) == 6
        if is_rest and nr_bytes > self._limits.longest(self._head[0]):
            self._refuse()
        is_open = self.assoc.dul.state_machine.current_state not in ("Sta1", "Sta2")
        deadline = time.monotonic() + (self._limits.network_timeout if is_open else self._limits.association_timeout)
        received = bytearray(self._handed_on[:nr_bytes])
        self._handed_on = self._handed_on[nr_bytes:]
        while len(received) < nr_bytes:
            piece = self.socket.recv(min(nr_bytes - len(received), _PIECE))
            if not piece:
                break
            received += piece
            if time.monotonic() > deadline:
                raise TimeoutError
        self._head = b"" if is_rest else bytes(received)
        if not is_rest and received[2:6] == b"\x00\x00\x00\x00":
            self._head = b""  # nothing follows
        return received

    def _refuse(self) -> None:
        log.warning("pdu.refused", reason="longer than it may be", address=self.assoc.requestor.address)
        self.send(_A_ABORT)
        raise ConnectionAbortedError

    def _shutdown_socket(self) -> None:
        """Close, also where the peer has gone already: pynetdicom leaves that to the garbage collector.

        A thread that still waits for the A-ASSOCIATE-RQ is told that there will be none.
        """
        close(self._client)
        if self.assoc.requestor.primitive is None:
            self.assoc.dul.to_user_queue.put(cast(Any, None))


class GuardedProvider(Provider):
    """The upper layer of one connection: takes C-STORE itself, and ends what its state machine does not know."""

    _inflow: Inflow | None = None

    def connect(self, client: socket.socket, limits: Limits, store: Store | None) -> None:
        """Read from `client`; `store` says who takes a C-STORE request."""
        association = self.assoc
        self.socket = GuardedSocket(association, client, limits)
        if store is not None:
            self._inflow = Inflow(
                client,
                longest_pdu=limits.longest(_P_DATA_TF),
                timeout=limits.network_timeout,
                begin=partial(store, association),
                progressed=self._idle_timer.restart,
            )

    def run_reactor(self) -> None:
        """Run until the connection ends; pynetdicom's own thread dies with a traceback and leaves everything open."""
        try:
            super().run_reactor()
        except Exception as error:
            log.info("association.broken", error=type(error).__name__, address=self.assoc.requestor.address)
            self.assoc.is_aborted = True
            self.assoc.is_established = False
            self.assoc._kill = self._kill_thread = True
            with suppress(Exception):
                self.assoc.dimse.msg_queue.put((None, None))  # whoever waits for a message waits in vain
        finally:
            if isinstance(self.socket, AssociationSocket):
                self.socket._shutdown_socket()
            if self._inflow is not None:
                self._inflow.close()

    def _is_transport_event(self) -> bool:
        """Read what there is to read; C-STORE requests never come as far as the state machine."""
        if self._is_new():
            return False  # asked once: if it began while we look, its first request would go to pynetdicom
        if self._inflow is not None and self._takes_messages() and cast(Any, self.socket).ready:
            try:
                handed_on = self._inflow.serve(linger=_LINGER, until=self._has_something_to_send)
            except Broken as reason:
                return self._broken(reason)
            if not handed_on:
                return True
            cast(Any, self.socket).hand_on(handed_on)
        return super()._is_transport_event()

    @property
    def is_to_wait(self) -> bool:
        """Whether the peer is ahead of the association's thread, which has not seen its acceptance or last message yet.

        What comes now would else be collected by pynetdicom, however large it is.
        """
        messages = cast(GuardedMessages, self.assoc.dimse)
        return self._is_new() or messages.msg_queue.qsize() > 0 or messages.is_reporting

    def _is_new(self) -> bool:
        return self.state_machine.current_state == "Sta6" and not cast(Reactor, self.assoc).has_begun

    def _takes_messages(self) -> bool:
        """Return whether a new message may begin: data transfer, and no message that pynetdicom is collecting."""
        association = self.assoc
        return (
            self.state_machine.current_state == "Sta6"
            and association.is_established
            and association.dimse.message is None
            and not cast(Any, self.socket).has_been_handed_on
        )

    def _has_something_to_send(self) -> bool:
        return self._kill_thread or not self.to_provider_queue.empty() or not self.assoc.is_established

    def _broken(self, reason: Broken) -> bool:
        """End the connection in the middle of a message; pynetdicom does the rest."""
        log.info("association.broken", reason=str(reason), address=self.assoc.requestor.address)
        if isinstance(reason, Violation):
            cast(Any, self.socket).send(_A_ABORT)
        cast(Any, self.socket).close()
        return True


class GuardedMessages(DIMSEServiceProvider):
    """Messages of limited size: a command set that does not end ends the association, a data set is not kept.

    An answer goes to who asked for it, past the requests that the association's thread serves: pynetdicom has one queue
    for both, takes a request that crosses with what it asked for a bad answer, and aborts.
    """

    def __init__(self, association: Association, room: Room) -> None:
        """Take the place of the association's own; data sets find `room`, or are not kept."""
        super().__init__(association)
        self._room = room
        self._command = 0
        self.is_reporting = False  # an N-EVENT-REPORT is being answered, in a thread of its own as pynetdicom has it
        self.msg_queue = Announced(cast(Any, association.dul).awake)
        self._asking = threading.Lock()
        self._message_ids = itertools.count(1)
        self._asked: tuple[int, queue.SimpleQueue[Any]] | None = None  # the Message ID, and where its answer goes

    def ask(self, request: Any, context_id: int) -> Any | None:
        """Send a request of the node's own, one at a time (PS3.7 D.3.3.3), and return its answer.

        None where the association ends first, or where no answer comes in time, which ends it.
        """
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with self._asking:
            request.MessageID = next(self._message_ids) & 0xFFFF
            self._asked = request.MessageID, answers
            self.send_msg(request, context_id)
            deadline = time.monotonic() + (self.dimse_timeout or math.inf)
            while self.assoc.is_established and time.monotonic() < deadline:
                with suppress(queue.Empty):
                    return answers.get(timeout=_GLANCE)
            if self.assoc.is_established:
                self.assoc.abort()  # whoever is to ask next would wait as long
        return None

    def send_msg(self, primitive: Any, context_id: int) -> None:
        """Send a message; no other comes between its parts, whichever thread sends it."""
        with cast(Provider, self.dul).sending:
            super().send_msg(primitive, context_id)

    def get_msg(self, block: bool = False) -> Any:
        """Take the next message, and let the next be read."""
        found = super().get_msg(block)
        if found[1] is not None:
            cast(Any, self.dul).wake()
        return found

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Collect a message, and hand it over when it is whole."""
        if self.message is None:
            self._command = 0
            self.message = DIMSEMessage()
            self.message.data_set = Collected(self._room)
        for _, value in primitive.presentation_data_value_list:
            if not value:
                raise ValueError("a PDV without its message control header")
            if value[0] & 1:
                self._command += len(value)
        if self._command > LONGEST_COMMAND:
            raise ValueError("a command set that does not end")
        message = self.message
        if message.decode_msg(primitive, self.assoc):
            self.message = None
            self._hand_over(message)
        else:
            cast(Collected, message.data_set).belongs_to(type(message).__name__)

    def _hand_over(self, message: DIMSEMessage) -> None:
        context_id = cast(int, message.context_id)
        try:
            request = message.message_to_primitive()
        except Exception as error:
            log.info("message.invalid", error=type(error).__name__, address=self.assoc.requestor.address)
            self.dul.event_queue.put("Evt19")  # an invalid PDU: it ends the association
            return
        if isinstance(request, C_CANCEL):
            return  # of no service that the node offers
        if isinstance(request, N_EVENT_REPORT) and request.is_valid_request:
            self.is_reporting = True
            threading.Thread(target=self._answer, args=(request, context_id), daemon=True).start()
        elif (asked := self._asked) is not None and request.MessageIDBeingRespondedTo == asked[0]:
            asked[1].put(request)
        else:
            self.msg_queue.put((context_id, request))

    def _answer(self, request: N_EVENT_REPORT, context_id: int) -> None:
        try:
            self.assoc._serve_request(request, context_id)
        finally:
            self.is_reporting = False
            cast(Any, self.dul).wake()


sockets.amend()
turns.amend()
proposals.amend()
