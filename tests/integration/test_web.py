"""Health, readiness and metrics: only for who has the token, whatever is sent to the port."""

from __future__ import annotations

import http.client
import socket
import stat
import threading
import time

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from dicom_node import log, tally
from dicom_node.config import parse
from dicom_node.errors import SettingsError
from dicom_node.node import Node
from tests.datasets import IDENTITY, ct, write

TOKEN = "recognisable-token-4711"


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A whole node without children: its broker is nowhere."""
    structlog.reset_defaults()
    log.configure()
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    made = Node(
        parse(
            f"""[node]
host = "127.0.0.1"
port = {ports[0]}
storage = "storage"
broker = "redis://127.0.0.1:{ports[1]}/0"
[receive]
minimum_free_megabytes = 1
[completion]
settle = 0.0
[web]
port = 0
""",
            base=tmp_path_factory.mktemp("node"),
        )
    )
    made.dicom_port = made.start()
    yield made
    made.stop()
    structlog.reset_defaults()


@pytest.fixture
def token(node):
    return (node._settings.node.storage / "web.token").read_text().strip()


def ask(node, path: str = "/metrics", *, token: str | None = None, method: str = "GET", **headers: str):
    """Return the status and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", node._web.port, timeout=10)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def numbers(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def raw(node, data: bytes, *, seconds: float = 8.0) -> bytes:
    with socket.create_connection(("127.0.0.1", node._web.port), timeout=seconds) as connection:
        try:
            connection.sendall(data)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            return b""
        return answer


def test_by_default_nothing_listens_for_http(tmp_path):
    assert parse("", base=tmp_path).web.port is None
    assert parse("[web]\nport = 1\n", base=tmp_path).web.host == "127.0.0.1"


def test_the_token_is_made_once_and_is_nobody_elses(node, token):
    path = node._settings.node.storage / "web.token"

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(token) == 64
    assert ask(node, "/health", token=token) == (200, "alive\n")
    assert node._web._server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/nothing"])
def test_without_the_token_nobody_learns_anything(node, token, path):
    refused = (401, "Unauthorized\n")

    assert ask(node, path) == refused
    assert ask(node, path, token="") == refused
    assert ask(node, path, token=token[:-1]) == refused
    assert ask(node, path, token=token + "0") == refused
    assert ask(node, path, Authorization=f"Basic {token}") == refused
    assert ask(node, f"{path}?token={token}") == refused
    assert raw(node, f"GET {path} HTTP/1.0\r\nAuthorization: Bearer \xff\xfe\r\n\r\n".encode("latin-1")).startswith(
        b"HTTP/1.0 401"
    )


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "NONSENSE"])
def test_nothing_but_get_is_answered(node, token, method):
    assert ask(node, "/health", token=token, method=method)[0] == 405


@pytest.mark.parametrize(
    "path", ["/", "/metrics/", "/../metrics", "/metrics/../../etc/passwd", "/%2e%2e/metrics", "/METRICS"]
)
def test_a_path_is_one_of_three_or_none(node, token, path):
    assert ask(node, path, token=token) == (404, "Not Found\n")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 7000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"b" * 10_000_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 600 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused_without_being_quoted(node, token, data, capsys):
    answer = raw(node, data)

    assert b"200" not in answer[:20]
    assert b"aaaa" not in answer
    assert ask(node, "/health", token=token)[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_a_byte_a_second_is_not_waited_for_and_costs_no_thread(node, token, eventually):
    before = threading.active_count()
    slow = [socket.create_connection(("127.0.0.1", node._web.port)) for _ in range(30)]
    started = time.monotonic()
    while time.monotonic() - started < 7.0:
        for connection in slow:
            try:
                connection.send(b"G")
            except OSError:
                continue
        time.sleep(0.5)
        assert threading.active_count() <= before + 8

    assert eventually(lambda: ask(node, "/health", token=token)[0] == 200)
    assert threading.active_count() <= before + 1
    for connection in slow:
        connection.close()


def test_ready_says_what_is_missing(node, token):
    status, body = ask(node, "/ready", token=token)

    assert status == 503
    assert body == "ledger: yes\nbroker: no\nroom: yes\n"


@pytest.mark.peer("storescu")
def test_the_metrics_say_what_happened_and_whose_it_was_they_do_not(node, token, dcmtk, tmp_path, eventually):
    before = numbers(ask(node, token=token)[1])
    for number in range(3):
        write(ct(number), tmp_path / f"{number}.dcm")
    sent = dcmtk("storescu", "127.0.0.1", node.dicom_port, *tmp_path.glob("*.dcm"))
    assert sent.returncode == 0, sent.stderr

    def grown(name: str, *labels: str) -> float:
        return numbers(ask(node, token=token)[1])[name, labels] - before.get((name, labels), 0.0)

    eventually(lambda: node.tick(now=time.time()) and grown("dicom_node_instances_total", "stored") == 3)
    assert grown("dicom_node_received_bytes_total") > 0
    text = ask(node, token=token)[1]
    found = numbers(text)
    assert found["dicom_node_ledger_up", ()] == 1
    assert found["dicom_node_broker_up", ()] == 0
    assert found["dicom_node_storage_free_bytes", ()] > 1e6
    assert found["dicom_node_jobs", ("infer", "queued")] == 0
    assert found["dicom_node_associations_open", ()] == 0
    for value in [*IDENTITY.values(), str(ct(1).StudyInstanceUID), str(ct(1).SOPInstanceUID), "1.2.840"]:
        assert str(value) not in text


def test_a_kind_that_somebody_else_words_does_not_grow_without_end():
    for number in range(1000):
        tally.count({"event": "tls.refused", "reason": f"REASON_{number}"})

    kinds = [kind for name, kind in tally.events() if name == "tls.refused"]
    assert len(kinds) <= 65
    assert tally.events()["tls.refused", "other"] >= 900


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("node.port", "[node]\nport = {port}"),
        ("node.port", "[node]\nport = {port}\n[receive]\nprocesses = 2"),
        ("web.port", "[node]\nport = 0\n[web]\nport = {port}"),
    ],
)
def test_a_port_that_is_taken_is_said_with_its_key(tmp_path, key, text):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        table = f'[node]\nhost = "127.0.0.1"\nstorage = "storage"\nbroker = "redis://127.0.0.1:{port}/0"'
        made = Node(parse(text.format(port=port).replace("[node]", table), base=tmp_path))
        try:
            with pytest.raises(
                SettingsError, match=rf"{key}: the node cannot listen .* {port}: Address already in use$"
            ):
                made.start()
        finally:
            made.stop()
