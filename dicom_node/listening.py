"""Accepts connections, and makes associations of them: as many as there may be, each let go of when it has ended."""

from __future__ import annotations

import errno
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import structlog
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.transport import AddressInformation, RequestHandler, ThreadedAssociationServer

from dicom_node.collecting import Room
from dicom_node.proposals import Negotiation
from dicom_node.reactors import Reactor
from dicom_node.sockets import close, hang_up
from dicom_node.wire import GuardedMessages, GuardedProvider, Limits, Store

log = structlog.get_logger()

_BACKLOG = 128  # connections that may wait to be accepted; pynetdicom's own 5 make a burst wait for seconds
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_SWITCH = 0.001  # seconds after which who waits asks whoever runs to let go; CPython's own 5 ms are seen by senders
_SWITCH_EACH = 30e-6  # the same for each thread there is: three thousand that ask so often leave no time for work
_PAUSE = 0.1  # seconds without accepting where there is no descriptor left


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
            deadline = threading.Timer(self.server.limits.association_timeout, hang_up, [self.request])
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

    def _create_association(self) -> Reactor:
        """Make an association as pynetdicom does, but for its threads, its limits, and what all share.

        pynetdicom copies the supported contexts and binds the handlers for each; it only reads them, and that takes
        longer than the rest.
        """
        server, entity = self.server, self.ae
        association = Reactor(entity, MODE_ACCEPTOR)
        association._server = server
        association.acse = Negotiation(association)
        provider = GuardedProvider(association)
        association.dul = provider
        association.acse_timeout, association.network_timeout = entity.acse_timeout, entity.network_timeout
        provider.connect(self.request, server.limits, server.store)
        association.dimse = GuardedMessages(association, server.room)
        association.acceptor.maximum_length = entity.maximum_pdu_size
        association.acceptor.ae_title = server.ae_title
        association.acceptor.address_info = server.local
        association.acceptor.implementation_class_uid = entity.implementation_class_uid
        association.acceptor.implementation_version_name = entity.implementation_version_name
        association.acceptor.supported_contexts = server.contexts
        association.requestor.address_info = self.remote
        bound: Any = server._handlers
        association._handlers = {
            event: handlers if event.is_intervention else list(handlers) for event, handlers in bound.items()
        }
        server.associated(self.request, association)
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
        store: Store | None = None,
        shares_port: bool = False,
        **options: Any,
    ) -> None:
        """Take what pynetdicom's own server takes, `limits`, and `store`, which says who takes a C-STORE request.

        `shares_port` lets other processes listen on the same port: the kernel gives each connection to one of them.
        """
        self.limits = limits
        self._shares_port = shares_port
        self.store = store
        self.room = Room()
        self.tls: Callable[[], ssl.SSLContext | None] | None = None
        self.on_failed_handshake: Callable[[str, str], None] = lambda address, reason: None
        self._connections: dict[socket.socket, tuple[str, Reactor | None]] = {}
        self._guard = threading.Lock()
        self._full = False
        super().__init__(entity, address, ae_title, contexts, request_handler=GuardedHandler, **options)

    def server_bind(self) -> None:
        """Bind, as pynetdicom does."""
        if self._shares_port:
            cast(socket.socket, self.socket).setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    @cached_property
    def local(self) -> AddressInformation:
        """Return where it listens."""
        return AddressInformation.from_tuple(self.server_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Make an association; in a thread of its own where hands are shaken first, for nothing else waits."""
        if self.tls is None:
            self.process_request_thread(request, client_address)
        else:
            super().process_request(request, client_address)

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
        admitted = self._admit(request, address)
        if not admitted:
            self.reap()  # what has ended since it was last looked keeps nobody out
            admitted = self._admit(request, address)
        _pace()
        if not admitted and not self._full:
            log.warning("connection.refused", reason="limit of connections reached", address=address)
        self._full = not admitted
        return admitted

    def _admit(self, request: socket.socket, address: str) -> bool:
        """Count a connection in where its address, and the node, may have one more."""
        with self._guard:
            here = Counter(known for known, _ in self._connections.values())
            if (
                len(self._connections) >= self.limits.maximum_connections
                or here[address] >= self.limits.maximum_connections_per_address
            ):
                return False
            self._connections[request] = (address, None)
            return True

    def replaced(self, before: socket.socket, after: socket.socket) -> None:
        """Note that a connection goes on under another socket object: TLS takes over the descriptor."""
        with self._guard:
            self._connections[after] = self._connections.pop(before, ("", None))

    def associated(self, request: socket.socket, association: Reactor) -> None:
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
        _pace()

    def shutdown_request(self, request: Any) -> None:
        """Close a connection that has not become an association."""
        with self._guard:
            self._connections.pop(request, None)
        close(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say that a connection failed; socketserver's own prints a traceback."""
        error = sys.exc_info()[1]
        log.error("connection.failed", error=type(error).__name__, address=str(client_address[0]))


def require_free(host: str, port: int) -> None:
    """Raise OSError where somebody listens on a port already: sharing it is for the processes of one node."""
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
        pass


def _pace() -> None:
    """Let threads ask for the interpreter less often where there are many."""
    sys.setswitchinterval(max(_SWITCH, _SWITCH_EACH * threading.active_count()))


def _has_ended(association: Reactor) -> bool:
    """Return whether both threads of an association are gone."""
    return association.has_run and not association.dul.is_alive()
