"""The one place that listens for HTTP: health, readiness and metrics, read-only, behind a token."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from socket import socket
from typing import Any

import structlog

from dicom_node.errors import listening

log = structlog.get_logger()

_LONGEST_HEAD = 8192  # bytes of a request, all of it
_PATIENCE = 5.0  # seconds for the whole request, and for one send
_AT_ONCE = 8  # connections; one more is closed at once

Page = Callable[[], tuple[HTTPStatus, str, bytes]]
"""What a path answers: status, content type, body."""


class Web:
    """An HTTP server for GET of a few paths; whoever has not the token learns nothing, not even which there are."""

    def __init__(self, host: str, port: int, *, token: str, pages: Mapping[str, Page]) -> None:
        """Listen on `host` and `port`, 0 for any that is free; `start` answers. SettingsError where it is taken."""
        with listening("web.host, web.port", host, port):
            self._server = _Server((host, port), token.encode(), pages)
        self.port = int(self._server.server_address[1])

    def start(self) -> None:
        """Answer, in threads of its own."""
        threading.Thread(target=self._server.serve_forever, name="web", daemon=True).start()
        log.info("web.listening", port=self.port)

    def stop(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, address: tuple[str, int], token: bytes, pages: Mapping[str, Page]) -> None:
        self.token, self.pages = token, pages
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without asking a name server who we are, as http.server does."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._places.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: who is too slow, too long or gone is no event."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "dicom-node", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = BytesIO(_head_of(self.connection))
        self.connection.settimeout(_PATIENCE)

    def do_GET(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.server.token):
            self._answer(HTTPStatus.UNAUTHORIZED)
            return
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            self._answer(HTTPStatus.NOT_FOUND)
            return
        try:
            answer = page()
        except Exception as error:  # a defect of ours: the place is logged, and the asker learns no more than that
            log.exception("web.defect", error=type(error).__name__)
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR)
            return
        self._answer(*answer)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer in words of ours: http.server's own quote the request."""
        self.close_connection = True
        status = HTTPStatus.METHOD_NOT_ALLOWED if code == HTTPStatus.NOT_IMPLEMENTED else HTTPStatus(code)
        self._answer(status)

    def _answer(self, status: HTTPStatus, content_type: str = "text/plain; charset=utf-8", body: bytes = b"") -> None:
        body = body or status.phrase.encode() + b"\n"
        self.send_response(status)
        for name, value in (
            ("Content-Type", content_type),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            *({HTTPStatus.UNAUTHORIZED: [("WWW-Authenticate", "Bearer")]}.get(status, [])),
            *({HTTPStatus.METHOD_NOT_ALLOWED: [("Allow", "GET")]}.get(status, [])),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep quiet: a path is whatever somebody typed."""


def _head_of(connection: socket) -> bytes:
    """Return a request up to the empty line; raise OSError where that is too long or too slow in coming."""
    deadline = time.monotonic() + _PATIENCE
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        if len(head) > _LONGEST_HEAD:
            raise ConnectionAbortedError
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionResetError
        head += piece
        if time.monotonic() > deadline:
            raise TimeoutError
    return head
