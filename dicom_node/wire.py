"""What guards the wire: connections, PDUs and messages that cost the node nothing, whoever sends them.

pynetdicom trusts its peers. It waits for as many bytes as a PDU header claims for as long as that takes, keeps
messages without end in memory, waits with `select`, which knows no descriptor above 1,023, and leaves sockets to the
garbage collector. The classes here stand in the places that it offers for its own; the one patch is at the end.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any, cast

import structlog
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationSocket, RequestHandler, ThreadedAssociationServer

log = structlog.get_logger()

_A_ASSOCIATE_RQ, _P_DATA_TF = 0x01, 0x04  # PDU types (PS3.8 Section 9.3.1)
_LARGEST_REQUEST = 1 << 20  # bytes of an A-ASSOCIATE-RQ; 128 contexts with every syntax there is need 200 kB
_LARGEST_OTHER = 1 << 16  # bytes of any other PDU but P-DATA-TF
_SLACK = 1024  # bytes by which a sender may have miscounted its P-DATA-TF
_LARGEST_COMMAND = 1 << 16  # bytes of a command set
_QUEUED = 4  # messages that wait for their handler before no more is read
_PIECE = 1 << 18
_BACKLOG = 128  # connections that may wait to be accepted; pynetdicom's own 5 make a burst wait for seconds
_A_ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x02\x06"  # by the service provider: invalid PDU parameter (PS3.8 9.3.8)
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE = 0.1  # seconds without accepting where there is no descriptor left


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection, one message and one address may cost; seconds and bytes."""

    maximum_pdu_length: int
    maximum_message: int
    association_timeout: float  # from the connection to the whole A-ASSOCIATE-RQ, TLS included
    network_timeout: float  # for one PDU, and for a send that nobody reads
    maximum_connections: int
    maximum_connections_per_address: int

    def longest(self, pdu_type: int) -> int:
        """Return how long the rest of a PDU of this type may be, in bytes."""
        if pdu_type == _P_DATA_TF:
            return self.maximum_pdu_length + _SLACK
        return _LARGEST_REQUEST if pdu_type == _A_ASSOCIATE_RQ else _LARGEST_OTHER


class TooLarge(BytesIO):
    """Stands for the data set of a message that was larger than what is taken: nothing of it was kept."""


class GuardedSocket(AssociationSocket):
    """A connection whose peer has a limited time for each PDU, and a limited length."""

    def __init__(self, association: Association, client: socket.socket, limits: Limits) -> None:
        """Wrap an accepted `client`."""
        super().__init__(association, client_socket=client)
        self._limits = limits
        self._head = b""
        client.settimeout(limits.network_timeout)
        self._client = client

    @property
    def ready(self) -> bool:
        """Whether there is something to read, and room for it: unanswered messages keep the peer waiting."""
        if self.assoc.dimse.msg_queue.qsize() >= _QUEUED:
            return False
        return _is_ready(self)

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
        received = bytearray()
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


class GuardedProvider(DULServiceProvider):
    """The upper layer of one connection: where its state machine meets what it does not know, the connection ends."""

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


class GuardedMessages(DIMSEServiceProvider):
    """Messages of limited size: a command set that does not end ends the association, a data set is not kept."""

    def __init__(self, association: Association, limits: Limits) -> None:
        """Take the place of the association's own."""
        super().__init__(association)
        self._limits = limits
        self._command = self._data = 0

    def receive_primitive(self, primitive: P_DATA) -> None:
        """Count what comes in before it is kept."""
        if self.message is None:
            self._command = self._data = 0
        for _, value in primitive.presentation_data_value_list:
            if not value:
                raise ValueError("a PDV without its message control header")
            if value[0] & 1:
                self._command += len(value)
            else:
                self._data += len(value) - 1
        if self._command > _LARGEST_COMMAND:
            raise ValueError("a command set that does not end")
        if self._data > self._limits.maximum_message:
            self._drop(primitive)
        super().receive_primitive(primitive)

    def _drop(self, primitive: P_DATA) -> None:
        """Keep of the fragments what says where the message ends."""
        kept: list[Any] = [  # of lists: pynetdicom takes no tuples, whatever it declares
            [context_id, value if value[0] & 1 else value[:1]]
            for context_id, value in primitive.presentation_data_value_list
        ]
        primitive.presentation_data_value_list = kept
        if self.message is not None and not isinstance(self.message.data_set, TooLarge):
            self.message.data_set = TooLarge()


class GuardedHandler(RequestHandler):
    """Makes an association of a connection: TLS first, in the connection's own thread."""

    server: GuardedServer

    def handle(self) -> None:
        """Shake hands, then let the association run; a peer that does not finish its handshake is let go."""
        context = self.server.tls() if self.server.tls else None
        if context is not None and not self._shake_hands(context):
            return
        super().handle()

    def _shake_hands(self, context: ssl.SSLContext) -> bool:
        plain: socket.socket = self.request
        plain.settimeout(self.server.limits.association_timeout)
        try:
            self.request = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
            self.server.replaced(plain, self.request)
            deadline = threading.Timer(self.server.limits.association_timeout, close, [self.request])
            deadline.daemon = True
            deadline.start()
            try:
                self.request.do_handshake()
            finally:
                deadline.cancel()
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or type(error).__name__
            self.server.on_failed_handshake(str(self.client_address[0]), str(reason))
            close(self.request)
            return False
        return True

    def _create_association(self) -> Association:
        association = super()._create_association()
        association.dul = GuardedProvider(association)
        association.acse_timeout, association.network_timeout = self.ae.acse_timeout, self.ae.network_timeout
        association.dul.socket = GuardedSocket(association, self.request, self.server.limits)
        association.dimse = GuardedMessages(association, self.server.limits)
        self.server.associated(self.request, association)
        return association


class GuardedServer(ThreadedAssociationServer):
    """Accepts connections, as many as it may, in all and from one address, and lets go of every one that has ended."""

    request_queue_size = _BACKLOG
    daemon_threads = True

    def __init__(
        self,
        entity: Any,
        address: Any,
        ae_title: str,
        contexts: Any,
        ssl_context: None,
        *,
        limits: Limits,
        **options: Any,
    ) -> None:
        """Take what pynetdicom's own server takes, and `limits`."""
        self.limits = limits
        self.tls: Callable[[], ssl.SSLContext | None] | None = None
        self.on_failed_handshake: Callable[[str, str], None] = lambda address, reason: None
        self._connections: dict[socket.socket, tuple[str, Association | None]] = {}
        self._guard = threading.Lock()
        self._full = False
        super().__init__(entity, address, ae_title, contexts, request_handler=GuardedHandler, **options)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; where no descriptor is left, wait a moment rather than ask again at once."""
        try:
            return cast(socket.socket, self.socket).accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                log.error("connection.refused", reason=f"no descriptors left: {error.strerror}")
                time.sleep(_PAUSE)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether a connection may stay; one that may not is closed at once."""
        address = str(client_address[0])
        with self._guard:
            here = Counter(known for known, _ in self._connections.values())
            admitted = (
                len(self._connections) < self.limits.maximum_connections
                and here[address] < self.limits.maximum_connections_per_address
            )
            if admitted:
                self._connections[request] = (address, None)
        if not admitted and not self._full:
            log.warning("connection.refused", reason="limit of connections reached", address=address)
        self._full = not admitted
        return admitted

    def replaced(self, before: socket.socket, after: socket.socket) -> None:
        """Note that a connection goes on under another socket object: TLS takes over the descriptor."""
        with self._guard:
            self._connections[after] = self._connections.pop(before, ("", None))

    def associated(self, request: socket.socket, association: Association) -> None:
        """Note which association a connection has become."""
        with self._guard:
            address, _ = self._connections.get(request, ("", None))
            self._connections[request] = (address, association)

    def reap(self) -> None:
        """Close what has ended without closing: an association whose threads are gone."""
        with self._guard:
            ended = [
                request
                for request, (_, association) in self._connections.items()
                if (request.fileno() < 0 if association is None else _has_ended(association))
            ]
            for request in ended:
                del self._connections[request]
        for request in ended:
            close(request)

    def service_actions(self) -> None:
        """Let go, twice a second."""
        super().service_actions()
        self.reap()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has not become an association."""
        with self._guard:
            self._connections.pop(request, None)
        close(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say that a connection failed; socketserver's own prints a traceback."""
        error = sys.exc_info()[1]
        log.error("connection.failed", error=type(error).__name__, address=str(client_address[0]))


def _has_ended(association: Association) -> bool:
    """Return whether both threads of an association are gone; one that has not started yet has not ended."""
    return association.ident is not None and not association.is_alive() and not association.dul.is_alive()


def close(connection: socket.socket) -> None:
    """Close a connection, whatever state it is in."""
    with suppress(OSError):  # not connected any more: closing still frees the descriptor
        connection.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        connection.close()


def _is_ready(self: AssociationSocket) -> bool:
    """Whether there is something to read, by `poll`: `select` refuses descriptors above 1,023."""
    connection = self.socket
    if connection is None or not self._is_connected:
        return False
    try:
        if isinstance(connection, ssl.SSLSocket) and connection.pending():
            return True
        waiting = select.poll()
        waiting.register(connection, select.POLLIN)
        return bool(waiting.poll(0))
    except (OSError, ValueError):
        self.event_queue.put("Evt17")  # transport connection closed
        return False


def _shutdown(self: AssociationSocket) -> None:
    if self.socket is not None:
        close(self.socket)


# The one patch: associations that the node itself requests are given pynetdicom's own socket, which would ask `select`,
# and which stays open where its connection was never made.
AssociationSocket._shutdown_socket = _shutdown  # type: ignore[method-assign]
AssociationSocket.ready = property(_is_ready)  # type: ignore[assignment, method-assign]
