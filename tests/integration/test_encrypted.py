"""Broker and ledger over TLS with a password, against a real Redis and a real PostgreSQL; nothing is told."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from dicom_node.broker import require_answer
from dicom_node.cli import app
from dicom_node.cli.advising import advice
from dicom_node.config import load, parse
from dicom_node.dispatch import Dispatcher
from dicom_node.errors import BrokerUnavailable, LedgerUnavailable, SettingsError
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import State
from tests.integration.test_dispatch import ROOT, WORKER, states, sweep_until
from tests.integration.test_postgres import _program
from tests.unit.test_ledger import inference

PASSWORD = "p@ss/w:rd %2F#?"  # every character that a URL could trip over
pytestmark = pytest.mark.peer("openssl")


@pytest.fixture(scope="module")
def redis_port(pki, tmp_path_factory):
    """A Redis that speaks nothing but TLS, wants a certificate, and knows one user."""
    program = shutil.which("redis-server", path="/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    (folder / "users.acl").write_text(
        f"user default off\nuser node on >{PASSWORD.replace(' ', '')} ~* &* +@all -@admin -@dangerous +info\n"
    )
    (folder / "redis.conf").write_text(
        f"port 0\ntls-port {port}\nbind 127.0.0.1 127.0.0.2\n"
        f"tls-cert-file {pki}/node.pem\ntls-key-file {pki}/node.key\n"
        f"tls-ca-cert-file {pki}/ca.pem\ntls-auth-clients yes\naclfile {folder}/users.acl\n"
        f'save ""\ndir {folder}\nlogfile {folder}/log\n'
    )
    process = subprocess.Popen([program, str(folder / "redis.conf")])
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    yield port
    process.kill()
    process.wait()


@pytest.fixture
def node_of(redis_port, pki, tmp_path):
    """Settings whose broker is that Redis, as an operator writes them; what is given replaces what is right."""
    (tmp_path / "password").write_text(PASSWORD.replace(" ", "") + "\n")

    def make(**wrong: str):
        options = {
            "ssl_ca_certs": f"{pki}/ca.pem",
            "ssl_certfile": f"{pki}/scanner.pem",
            "ssl_keyfile": f"{pki}/scanner.key",
        }
        user, host, scheme = wrong.pop("user", "node"), wrong.pop("host", "127.0.0.1"), wrong.pop("scheme", "rediss")
        secret = wrong.pop("password", "${file:password}")
        options = {key: value for key, value in (options | wrong).items() if value} if scheme == "rediss" else {}
        query = "&".join(f"{key}={value}" for key, value in options.items())
        text = f"""[node]
storage = "storage"
broker = "{scheme}://{user}:{secret}@{host}:{redis_port}/0{"?" if query else ""}{query}"
[jobs]
hint_again = 1.0
"""
        (tmp_path / "node.toml").write_text(text)
        return parse(text, base=tmp_path)

    return make


def test_a_job_goes_over_tls_with_certificate_user_and_password(node_of, tmp_path):
    settings = node_of()
    ledger = Ledger(settings.ledger_url, migrate=True)
    dispatcher = Dispatcher(settings, ledger)
    number = inference(ledger)
    command = [sys.executable, "-c", WORKER, str(tmp_path / "node.toml"), "w1", "0"]
    worker = subprocess.Popen(command, cwd=ROOT)
    try:
        sweep_until(dispatcher, lambda: states(ledger, [number]) == {State.FAILED})
    finally:
        worker.kill()
        worker.wait()
        dispatcher.close()
        ledger.close()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"password": "another-secret"}, "refuses user and password"),
        ({"user": "somebody"}, "refuses user and password"),
        ({"ssl_ca_certs": ""}, "its certificate is refused: "),
        ({"ssl_ca_certs": "PKI/stranger.pem"}, "its certificate is refused: "),
        ({"ssl_ca_certs": "/nowhere.pem"}, "a file of ssl_...: No such file"),
        ({"ssl_certfile": "", "ssl_keyfile": ""}, "node.broker: TLS was not agreed on|does not answer"),
        ({"ssl_certfile": "PKI/intruder.pem", "ssl_keyfile": "PKI/intruder.key"}, "TLS was not agreed on|not answer"),
        ({"host": "127.0.0.2"}, "its certificate is refused: IP address mismatch"),
        ({"scheme": "redis"}, "does not answer"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_a_broker_that_is_not_who_it_should_be_is_named_and_the_password_is_not(node_of, pki, wrong, words):
    settings = node_of(**{key: value.replace("PKI", str(pki)) for key, value in wrong.items()})

    with pytest.raises(BrokerUnavailable, match=words) as caught:
        require_answer(settings)

    told = str(caught.value) + repr(settings)
    assert PASSWORD.replace(" ", "") not in told
    assert "another-secret" not in told


def test_verification_is_off_only_where_it_is_said(node_of, pki):
    require_answer(node_of(ssl_ca_certs=f"{pki}/stranger.pem", ssl_cert_reqs="none"))


@pytest.mark.parametrize(
    ("broker", "words"),
    [
        ("http://node:S3cretWord@queue", "not a URL such as rediss"),
        ("rediss://node:S3cretWord@queue:port/0", "not a URL such as rediss"),
        ("rediss://node:S3cretWord@queue/0?ssl_cert_reqs=optional", "ssl_cert_reqs"),
        ("rediss://node:S3cretWord@queue/0?ssl_what=1", "ssl_what.* is no option"),
        ("redis://node:S3cretWord@queue/0?ssl_ca_certs=ca.pem", "ssl_ca_certs.* is no option"),
    ],
)
def test_a_broker_url_that_is_wrong_is_refused_by_its_key(tmp_path, broker, words):
    settings = parse(f'[node]\nbroker = "{broker}"\n', base=tmp_path)

    with pytest.raises(SettingsError, match=f"node.broker: .*{words}") as caught:
        require_answer(settings)

    assert "S3cretWord" not in str(caught.value)


# -- PostgreSQL -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres_port(pki):
    """A PostgreSQL on TCP that lets nobody in without TLS and a password."""
    initdb, postgres = _program("initdb"), _program("postgres")
    if not initdb or not postgres:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="dicom-node-pg-"))
    runner: list[str] = []
    (folder / "password").write_text(PASSWORD)
    for name in ("node.pem", "node.key"):
        (folder / name).write_bytes((pki / name).read_bytes())
        (folder / name).chmod(0o600)
    if os.geteuid() == 0:
        if not shutil.which("runuser") or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("PostgreSQL refuses to run as root, and there is no user postgres")
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, "postgres")
        runner = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    command = [*runner, initdb, "-D", str(data), "-U", "node", "-A", "scram-sha-256", "--pwfile", f"{folder}/password"]
    subprocess.run([*command, "-E", "UTF8", "--no-sync"], check=True, capture_output=True, cwd="/")
    rule = "hostssl all all 127.0.0.1/32 scram-sha-256\n"
    subprocess.run([*runner, "tee", str(data / "pg_hba.conf")], input=rule.encode(), check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": folder,
        "fsync": "off",
        "ssl": "on",
        "ssl_cert_file": folder / "node.pem",
        "ssl_key_file": folder / "node.key",
    }
    settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*runner, postgres, "-D", str(data), *settings], stdout=log, stderr=log, cwd="/")
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    yield port
    pid = int((data / "postmaster.pid").read_text().splitlines()[0])
    os.kill(pid, 3)  # SIGQUIT: at once
    process.wait(20)
    shutil.rmtree(folder, ignore_errors=True)


def ledger_url(port: int, folder: Path, tail: str, secret: str = "${file:password}") -> str:
    (folder / "password").write_text(PASSWORD + "\n")
    text = f'[node]\nledger = "postgresql+psycopg://node:{secret}@127.0.0.1:{port}/postgres?{tail}"\n'
    return parse(text, base=folder).ledger_url


def test_the_ledger_is_kept_over_tls_with_a_password(postgres_port, pki, tmp_path):
    url = ledger_url(postgres_port, tmp_path, f"sslmode=verify-full&sslrootcert={pki}/ca.pem")
    ledger = Ledger(url, migrate=True)

    inference(ledger)

    with ledger._database.engine.connect() as connection:
        assert connection.connection.driver_connection.pgconn.ssl_in_use
    assert PASSWORD not in repr(ledger._database.engine.url)
    ledger.close()


@pytest.mark.parametrize(
    ("tail", "secret", "words"),
    [
        ("sslmode=verify-full&sslrootcert=PKI/ca.pem", "another-secret", "password authentication failed"),
        ("sslmode=verify-full&sslrootcert=PKI/stranger.pem", "${file:password}", "certificate verify failed"),
        ("sslmode=verify-full&sslrootcert=/nowhere.pem", "${file:password}", "does not exist|nowhere.pem"),
        ("sslmode=disable", "${file:password}", "no pg_hba.conf entry|no encryption"),
    ],
)
def test_a_ledger_that_is_not_who_it_should_be_is_named_and_the_password_is_not(
    postgres_port, pki, tmp_path, tail, secret, words
):
    url = ledger_url(postgres_port, tmp_path, tail.replace("PKI", str(pki)), secret)

    with pytest.raises(LedgerUnavailable, match=f"node.ledger: .*({words})") as caught:
        Ledger(url, migrate=True)

    assert PASSWORD not in str(caught.value)
    assert "another-secret" not in str(caught.value)


# -- nothing is told --------------------------------------------------------------------------------------

SECRETS = {
    "password": PASSWORD.replace(" ", ""),
    "ledger": PASSWORD,
    "token": "Web-Token-S3cr3t-0815",
    "passcode": "Pass-Code-S3cr3t-4711",
    "key_password": "Key-Word-S3cr3t-1234",
}
SPELLINGS = {*SECRETS.values(), *(quote(each, safe="") for each in SECRETS.values())}


@pytest.fixture
def told_to_nobody(redis_port, postgres_port, pki, tool, free_port, tmp_path):
    """A node.toml with a secret in every place that takes one."""
    for name, secret in SECRETS.items():
        (tmp_path / name).write_text(secret + "\n")
    encrypt = [tool("openssl"), "pkey", "-in", pki / "node.key", "-aes256", "-passout", f"file:{tmp_path}/key_password"]
    subprocess.run([*map(str, encrypt), "-out", str(tmp_path / "node.key")], check=True, capture_output=True)
    tls = f"ssl_ca_certs={pki}/ca.pem&ssl_certfile={pki}/scanner.pem&ssl_keyfile={pki}/scanner.key"
    (tmp_path / "node.toml").write_text(
        f"""[node]
host = "127.0.0.1"
port = {free_port()}
storage = "storage"
ledger = "postgresql://node:${{file:ledger}}@127.0.0.1:{postgres_port}/postgres?sslmode=verify-full&sslrootcert={pki}/ca.pem"
broker = "rediss://node:${{file:password}}@127.0.0.1:{redis_port}/0?{tls}"
[receive]
minimum_free_megabytes = 1
[tls]
port = {free_port()}
certificate = "{pki}/node.pem"
key = "node.key"
key_password = "${{file:key_password}}"
ca = "{pki}/ca.pem"
[web]
port = {free_port()}
token = "${{file:token}}"
[peer.PACS]
ae_title = "PACS"
host = "127.0.0.1"
port = {free_port()}
tls = true
user = "pacs"
passcode = "${{env:PACS_PASSCODE}}"
"""
    )
    return tmp_path / "node.toml"


def secrets_in(text: str) -> list[str]:
    return [each for each in SPELLINGS if each in text]


def command_lines() -> str:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)


@pytest.mark.parametrize(
    "right", [pytest.param(True, marks=pytest.mark.slow), False], ids=["all is well", "the broker refuses"]
)
def test_no_secret_is_in_a_log_a_command_line_or_an_answer(told_to_nobody, tmp_path, monkeypatch, eventually, right):
    monkeypatch.setenv("PACS_PASSCODE", SECRETS["passcode"])
    Ledger(load(told_to_nobody).ledger_url, migrate=True).close()
    if not right:  # everybody may complain
        (tmp_path / "password").write_text("Wrong-" + SECRETS["token"])
    programs = {
        "node": ["dicom_node", "serve", "--verbose", "--settings", str(told_to_nobody)],
        "worker": ["workers", "--settings", str(told_to_nobody)],
    }
    running = {}
    for name, arguments in programs.items():
        with (tmp_path / f"{name}.log").open("wb") as output:
            running[name] = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stdout=output, stderr=output)
    try:
        eventually(lambda: "worker.ready" in (tmp_path / "worker.log").read_text(), seconds=60)
        eventually(lambda: "web.listening" in (tmp_path / "node.log").read_text(), seconds=60)
        if not right:
            eventually(lambda: "refuse" in said(told_to_nobody, "check"), seconds=30)
            eventually(lambda: "Cannot connect" in (tmp_path / "worker.log").read_text(), seconds=30)
        answers = [
            said(told_to_nobody, *words)
            for words in (("check",), ("check", "--json"), ("status", "--json"), ("peers", "list", "--json"), ("echo",))
        ]
        answers += [said(told_to_nobody, "peers", "probe", "PACS"), repr(load(told_to_nobody)), command_lines()]
    finally:
        for process in running.values():
            process.terminate()
            process.wait(60)
    logs = [(tmp_path / f"{name}.log").read_text() for name in programs]

    assert [secrets_in(text) for text in [*answers, *logs]] == [[]] * (len(answers) + len(logs))
    assert all(len(text) > 10 for text in [*answers, *logs])


def said(path: Path, *words: str) -> str:
    answer = CliRunner().invoke(app, [*words, "--settings", str(path)])
    return answer.output + str(answer.exception or "")


@pytest.mark.parametrize(
    "text",
    [
        '[node]\nae_title = "${file:ledger}, much too long"',
        '[node]\ndevice = "${file:token}"',
        '[tls]\nminimum_version = "${file:token}"',
        '[receive]\naddresses = ["${file:token}"]',
        '[peer.PACS]\nae_title = "PACS"\nhost = "pacs"\nport = "${file:token}"',
        '[peer.PACS]\nae_title = "PACS"\nhost = "pacs"\nport = 104\nresults = ["${file:token}"]',
        '[[route]]\nrun = ["${file:token}"]\nsend_to = ["PACS"]',
    ],
)
def test_a_secret_in_the_wrong_place_is_not_quoted(tmp_path, text):
    for name in ("ledger", "token"):
        (tmp_path / name).write_text(SECRETS[name])

    with pytest.raises(SettingsError) as caught:
        parse(text, base=tmp_path)

    assert secrets_in(str(caught.value)) == []


# -- what `check` says ------------------------------------------------------------------------------------


def advised(tmp_path, text: str) -> set[str]:
    path = tmp_path / "node.toml"
    path.write_text(text)
    path.chmod(0o644)
    return {what for what, _ in advice(load(path), path)}


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ('[node]\nbroker = "redis://queue:6379/0"', {"broker"}),
        ('[node]\nbroker = "rediss://queue:6379/0?ssl_cert_reqs=none"', {"broker"}),
        ('[node]\nbroker = "rediss://queue:6379/0?ssl_check_hostname=false"', {"broker"}),
        ('[node]\nbroker = "rediss://queue:6379/0"', set()),
        ('[node]\nbroker = "redis://127.0.0.1:6379/0"', set()),
        ('[node]\nledger = "postgresql://node@db/node"', {"ledger"}),
        ('[node]\nledger = "postgresql://node@db/node?sslmode=require"', {"ledger"}),
        ('[node]\nledger = "postgresql://node@db/node?sslmode=verify-full"', set()),
        ('[node]\nledger = "postgresql://node@/node?host=/run/postgresql"', set()),
        ('[node]\nledger = "postgresql://node:secret@localhost/node"', {"settings"}),
        ('[web]\nport = 1\nhost = "0.0.0.0"', {"web"}),
        ('[web]\nport = 1\ntoken = "secret"', {"settings"}),
    ],
)
def test_check_advises_where_more_safety_is_to_be_had(tmp_path, text, about):
    assert advised(tmp_path, text) == about


def test_check_advises_where_others_can_read_a_key(tmp_path, pki):
    for name in ("node.pem", "node.key", "ca.pem"):
        (tmp_path / name).write_bytes((pki / name).read_bytes())
    text = '[tls]\ncertificate = "node.pem"\nkey = "node.key"\nca = "ca.pem"\n'
    (tmp_path / "node.key").chmod(0o640)
    assert advised(tmp_path, text) == {"tls.key"}

    (tmp_path / "node.key").chmod(0o600)
    assert advised(tmp_path, text) == set()
