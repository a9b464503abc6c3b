"""One origin for the viewer and its archive: OHIF's files, and a streaming proxy to Orthanc's DICOMweb.

It is for whoever has the token: the address that is opened first bears it, a cookie from then on.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import http.client
import http.cookies
import mimetypes
import threading
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

PROXIED = ("/dicom-web", "/wado")
HEADERS = {
    # the first two are what a browser asks for before it gives the viewer memory that its workers share
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
USER = "viewer"  # at Orthanc, with the token as password
_COOKIE, _TOKEN = "dicom-node-viewer", "token"
_OPEN = "/manifest.json"  # OHIF's own, which browsers ask for without cookies
_NOT_PASSED_ON = {"cookie", "authorization"}
_HOP_BY_HOP = {
    *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"),
    *("upgrade", "content-length"),
}
_CHUNK = 256 * 1024  # bytes
_TIMEOUT = 120.0  # seconds that Orthanc may take to begin its answer
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))

mimetypes.add_type("application/wasm", ".wasm")
mimetypes.add_type("text/javascript", ".js")


def is_proxied(path: str) -> bool:
    """Return whether a path is the archive's."""
    return any(path == root or path.startswith((f"{root}/", f"{root}?")) for root in PROXIED)


def file_for(dist: Path, target: str) -> Path | None:
    """Return the file that answers a request, the page itself for a path of the viewer's own, None for neither."""
    relative = unquote(urlsplit(target).path).lstrip("/")
    path = (dist / relative).resolve()
    if not path.is_relative_to(dist.resolve()) or "\0" in relative:
        return None
    if path.is_file():
        return path
    return None if Path(relative).suffix else dist / "index.html"


def is_known_host(host: str) -> bool:
    """Return whether a Host header names this machine: a page elsewhere must not read images by a name it made up."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    return name in _LOOPBACK


def token_in(target: str) -> tuple[str, str]:
    """Return the token that the address of a request bears, empty where it bears none, and the address without it."""
    parts = urlsplit(target)
    query = parse_qsl(parts.query, keep_blank_values=True)
    rest = urlencode([each for each in query if each[0] != _TOKEN])
    path = "/" + parts.path.lstrip("/")  # of two slashes a browser would make another host
    return dict(query).get(_TOKEN, ""), urlunsplit(("", "", path, rest, ""))


def token_of(cookies: str) -> str:
    """Return the token that a Cookie header bears, empty where it bears none."""
    try:
        found = http.cookies.SimpleCookie(cookies).get(_COOKIE)
    except http.cookies.CookieError:
        return ""
    return found.value if found else ""


class ViewerServer(ThreadingHTTPServer):
    """Serves until `close`, whoever has `token`; `orthanc` is the address of its HTTP server."""

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], *, dist: Path, app_config: Path, orthanc: tuple[str, int], token: str
    ) -> None:
        """Bind `address`; nothing is answered before `start`."""
        self.dist, self.app_config, self.orthanc, self.token = dist, app_config, orthanc, token
        super().__init__(address, _Handler)
        self.is_private = address[0] in _LOOPBACK

    def start(self) -> None:
        """Answer requests in a thread."""
        threading.Thread(target=self.serve_forever, name="viewer", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a browser that leaves in the middle of an image is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ViewerServer

    def do_GET(self) -> None:
        """Answer from the archive or from OHIF's files."""
        if self.server.is_private and not is_known_host(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.path != _OPEN and not self._is_the_token(token_of(self.headers.get("Cookie", ""))):
            self._let_in()
        elif is_proxied(self.path):
            self._pass_on()
        elif self.command == "POST":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED)
        else:
            self._send_file()

    do_HEAD = do_POST = do_GET

    def _is_the_token(self, said: str) -> bool:
        return hmac.compare_digest(said.encode(), self.server.token.encode())

    def _let_in(self) -> None:
        """Give whoever opens the address with the token a cookie, and send them to the address without it."""
        token, rest = token_in(self.path)
        if not self._is_the_token(token):
            self._refuse(HTTPStatus.UNAUTHORIZED)
            return
        cookie = f"{_COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict"
        headers = {"Set-Cookie": cookie, "Location": rest, "Content-Length": "0", "Cache-Control": "no-store"}
        self._begin(HTTPStatus.SEE_OTHER, headers.items())

    def _send_file(self) -> None:
        is_config = urlsplit(self.path).path == "/app-config.js"
        path = self.server.app_config if is_config else file_for(self.server.dist, self.path)
        if path is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        with path.open("rb") as file:
            headers = {
                "Content-Type": mimetypes.guess_type(path.name)[0] or "application/octet-stream",
                "Content-Length": str(path.stat().st_size),
                "Cache-Control": "no-cache" if is_config or path.name == "index.html" else "max-age=86400",
            }
            self._begin(HTTPStatus.OK, headers.items())
            if self.command != "HEAD":
                for chunk in chunks_of(file):
                    self.wfile.write(chunk)

    def _pass_on(self) -> None:
        """Ask Orthanc the same and hand its answer on while it comes; Host stays, for Orthanc makes links of it."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
        kept = _HOP_BY_HOP | _NOT_PASSED_ON
        sent = {name: value for name, value in self.headers.items() if name.lower() not in kept}
        sent["Authorization"] = "Basic " + base64.b64encode(f"{USER}:{self.server.token}".encode()).decode()
        with contextlib.closing(http.client.HTTPConnection(*self.server.orthanc, timeout=_TIMEOUT)) as connection:
            try:
                connection.request(self.command, self.path, body=body, headers=sent)
                answer = connection.getresponse()
            except OSError:
                self._refuse(HTTPStatus.BAD_GATEWAY)
                return
            self._relay(answer)

    def _relay(self, answer: http.client.HTTPResponse) -> None:
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
        length = answer.getheader("Content-Length")
        is_chunked = length is None
        headers.append(("Transfer-Encoding", "chunked") if length is None else ("Content-Length", length))
        self._begin(answer.status, headers)
        if self.command == "HEAD":
            return
        for chunk in chunks_of(answer):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if is_chunked else chunk)
        if is_chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _begin(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in (*headers, *HEADERS.items()):
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: HTTPStatus) -> None:
        text = f"{status.value} {status.phrase}\n".encode()
        self.close_connection = True
        self._begin(status, {"Content-Type": "text/plain", "Content-Length": str(len(text))}.items())
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet: an address has the UIDs of a patient's study in it."""


def chunks_of(stream: BinaryIO | http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield what a stream has, as it comes."""
    read = stream.read1 if isinstance(stream, http.client.HTTPResponse) else stream.read
    while chunk := read(_CHUNK):
        yield chunk
