"""The audit trail end to end: what the edges report arrives at a collector, exactly and in order, whatever happens."""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import stat
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lxml import etree
from pynetdicom import AE
from pynetdicom.pdu_primitives import UserIdentityNegotiation
from typer.testing import CliRunner

from dicom_node.audit import Audit, messages, syslog
from dicom_node.audit.messages import EVENTS
from dicom_node.cli import app
from dicom_node.cli.console import console
from dicom_node.config import AuditTable, Peer, load, parse
from dicom_node.entities import AssociationIdentity
from dicom_node.errors import LedgerUnavailable, PeerBusy, SettingsError
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import Interrupted
from dicom_node.services import Rejection
from dicom_node.tls import client_context
from tests.acceptance.stand import NodeProcess
from tests.datasets import CT, EXPLICIT, IDENTITY, as_file, ct, uid, write

pytestmark = pytest.mark.peer("openssl")
HERE = "127.0.0.1"
SCHEMA = etree.RelaxNG(etree.parse(Path(__file__).parents[1] / "audit-message.rng"))
SCANNER = AssociationIdentity("a1", "SCANNER", "DICOM_NODE", "10.1.2.3")
PACS = Peer(ae_title="PACS", host="10.0.0.5", port=104)


def table(pki, port: int, **options) -> AuditTable:
    files = {"tls_ca": pki / "ca.pem", "tls_certificate": pki / "node.pem", "tls_key": pki / "node.key"}
    return AuditTable(collector=f"{HERE}:{port}", **(files | options))


def settings(pki, port: int, more: str = "") -> str:
    return f"""[receive]
minimum_free_megabytes = 1
[audit]
collector = "{HERE}:{port}"
site = "Hospital"
tls_ca = "{pki}/ca.pem"
tls_certificate = "{pki}/node.pem"
tls_key = "{pki}/node.key"
{more}
"""


class Collector:
    """A syslog receiver over TLS that reads frames as RFC 5425 has them, and may be told to misbehave."""

    def __init__(self, pki: Path, port: int = 0) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(pki / "other.pem", pki / "other.key")
        self.context.load_verify_locations(pki / "ca.pem")
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.listener = socket.create_server((HERE, port))
        self.port = self.listener.getsockname()[1]
        self.received: list[bytes] = []
        self.connections = 0
        self.answers = True  # its connections end as they should
        self.reads = True
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            try:
                plain.settimeout(20)
                with self.context.wrap_socket(plain, server_side=True) as connection:
                    self._read(connection)
            except OSError:
                continue

    def _read(self, connection: ssl.SSLSocket) -> None:
        if not self.reads:
            time.sleep(0.3)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a process that is killed
            return
        stream = connection.makefile("rb")
        while head := self._head(stream):
            body = stream.read(head)
            assert len(body) == head
            self.received.append(body)
        if self.answers:
            connection.unwrap()
        else:
            time.sleep(3)

    @staticmethod
    def _head(stream) -> int:
        digits = b""
        while (letter := stream.read(1)) not in (b" ", b""):
            digits += letter
        assert not digits or digits.isdigit()
        return int(digits or 0)

    @property
    def messages(self) -> list[etree._Element]:
        return [content(each) for each in self.received]

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.fixture
def collector(pki):
    made: list[Collector] = []

    def make(port: int = 0) -> Collector:
        made.append(Collector(pki, port))
        return made[-1]

    yield make
    for one in made:
        try:
            one.stop()
        except OSError:
            continue


def content(record: bytes) -> etree._Element:
    """Return the XML of a syslog message; it is valid, or the test fails."""
    head, xml = record.split(b"\xef\xbb\xbf", 1)
    assert head.startswith((b"<84>1 ", b"<85>1 "))
    root = etree.fromstring(xml)
    SCHEMA.assertValid(root)
    return root


def code(root: etree._Element) -> str:
    return root.find("EventIdentification/EventID").get("csd-code")


def kind(root: etree._Element) -> tuple[str, str]:
    event = root.find("EventIdentification")
    return code(root), event.get("EventOutcomeIndicator")


def waiting(folder: Path) -> list[etree._Element]:
    """What lies in the spool."""
    kept = [path for path in (folder / "storage" / "audit").glob("[0-9]*") if not path.suffix]
    return [content(path.read_bytes()) for path in sorted(kept)]


@pytest.fixture
def audit(pki, tmp_path, ledger):
    """Makes audit trails with a collector at a port, by default one where nobody listens."""

    def make(port: int = 1, more: str = "") -> Audit:
        text = '[node]\nae_title = "DICOM_NODE"\nstorage = "storage"\n' + settings(pki, port, more)
        return Audit(parse(text, base=tmp_path), ledger)

    return make


def report_everything(audit: Audit, file: Path) -> None:
    """Report every event once."""
    audit.start([Interrupted("1.2.9", "SCANNER", 7)])
    transfers = messages.Transfers()
    transfers._counts = {("1.2.3", outcome): {CT: 2} for outcome in ("stored", "duplicate", "quarantined")}
    audit.received([messages.Visit(SCANNER, transfers, is_released=False)])
    with audit.shipment("1.2.3", PACS) as shipment:
        shipment.begin([(CT, file)])
        shipment.stored(CT, file)
    with suppress(PeerBusy), audit.shipment("1.2.3", PACS) as shipment:
        shipment.begin([(CT, file)])
        raise PeerBusy
    audit.deleted("1.2.3", {CT: 2}, reason="older than 30 days")
    for rejection in Rejection:
        audit.rejected(SCANNER, rejection, "intruder")
    audit.handshake_failed("10.9.9.9", "CERTIFICATE_VERIFY_FAILED")
    audit.admitted(SCANNER, "scanner")
    audit.certificate_reloaded()
    audit.used("root")
    audit.stop()


def test_every_event_is_a_valid_message_and_a_line_of_the_ledger(audit, ledger, tmp_path):
    file = write(ct(), tmp_path / "1.dcm")
    report_everything(audit(), file)

    told = waiting(tmp_path)
    lines = ledger.history.audit(limit=1000)
    assert {code(root) for root in told} == {event.value for event, _ in EVENTS}
    assert [line["fields"]["event"] for line in lines] == [code(root) for root in told]
    assert [str(line["fields"]["indicator"]) for line in lines] == [kind(root)[1] for root in told]
    for root in told:
        participants = root.findall("ActiveParticipant")
        assert sum(each.get("UserIsRequestor") == "true" for each in participants) <= 1
        if code(root) in ("110102", "110104"):
            roles = [each.find("RoleIDCode").get("csd-code") for each in participants]
            assert roles == ["110153", "110152"]
        if code(root) == "110113":
            assert root.find("EventIdentification/EventTypeCode") is not None
            for detail in root.iter("ParticipantObjectDetail"):
                assert detail.get("type") == "Alert Description"
                assert base64.b64decode(detail.get("value"))


def test_by_default_nothing_says_who_the_patient_is(audit, ledger, tmp_path):
    write(ct(), tmp_path / "1.dcm")
    report_everything(audit(), tmp_path / "1.dcm")

    everything = str(ledger.history.recent_events(limit=1000)) + "".join(
        path.read_bytes().decode() for path in (tmp_path / "storage" / "audit").glob("[0-9]*")
    )
    assert not [value for value in IDENTITY.values() if value in everything]
    assert not [root for root in waiting(tmp_path) if root.findall(".//*[@ParticipantObjectTypeCodeRole='1']")]


def test_where_it_is_asked_for_the_message_names_the_patient_and_the_ledger_does_not(audit, ledger, tmp_path, capsys):
    study = tmp_path / "storage" / "studies" / "1.2.3" / "1.2.3.4"
    study.mkdir(parents=True)
    file = write(ct(), study / "1.dcm")
    report_everything(audit(more="patient = true"), file)

    for root in waiting(tmp_path):
        patients = root.findall("ParticipantObjectIdentification[@ParticipantObjectTypeCodeRole='1']")
        if code(root) in ("110102", "110104", "110105"):
            (patient,) = patients
            is_known = "1.2.9" not in etree.tostring(root).decode()  # of that study no file has come
            assert patient.get("ParticipantObjectID") == (IDENTITY["PatientID"] if is_known else "unknown")
        else:
            assert not patients
    everything = str(ledger.history.recent_events(limit=1000)) + str(capsys.readouterr())
    assert not [value for value in IDENTITY.values() if value in everything]
    names = [path.name for path in (tmp_path / "storage" / "audit").iterdir()]
    assert all(name == "lock" or name.isdigit() for name in names)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "storage" / "audit").iterdir()}
    assert modes == {0o600}


def test_without_a_collector_there_are_lines_and_no_files(ledger, tmp_path):
    trail = Audit(parse('[node]\nstorage = "storage"\n', base=tmp_path), ledger)

    report_everything(trail, write(ct(), tmp_path / "1.dcm"))

    assert len(ledger.history.audit(limit=100)) > 10
    assert not (tmp_path / "storage" / "audit").exists()


def test_the_command_shows_the_trail_and_that_it_was_looked_at_is_in_it(pki, tmp_path, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)
    (tmp_path / "node.toml").write_text('[node]\nstorage = "storage"\n' + settings(pki, 1))
    loaded = load(tmp_path / "node.toml")
    ledger = Ledger(loaded.ledger_url, migrate=True)
    Audit(loaded, ledger).deleted("1.2.3", {CT: 2}, reason="older than 30 days")
    command = ["audit", "--settings", str(tmp_path / "node.toml")]

    shown = CliRunner().invoke(app, command)
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    ledger.close()

    assert shown.exit_code == 0
    assert "dicom study deleted" in shown.stdout
    assert "older than 30 days" in shown.stdout
    assert "1 message(s) wait for 127.0.0.1:1" in shown.stdout
    assert [line["name"] for line in told["lines"]] == ["audit.dicom_study_deleted", "audit.audit_log_used"]
    assert told["waiting"] == 2


def test_a_ledger_that_is_away_and_a_spool_that_is_away_lose_nothing(audit, ledger, tmp_path, monkeypatch):
    trail, file = audit(), write(ct(), tmp_path / "1.dcm")
    note = ledger.history.note

    def away(*_args, **_fields):
        raise LedgerUnavailable

    monkeypatch.setattr(ledger.history, "note", away)
    (tmp_path / "storage").write_text("not a folder")
    for number in range(3):
        trail.deleted(f"1.2.{number}", {CT: 1}, reason="age")
    (tmp_path / "storage").unlink()
    trail.deleted("1.2.3", {CT: 1}, reason="age")
    monkeypatch.setattr(ledger.history, "note", note)
    trail.tick()

    told = [root.find("ParticipantObjectIdentification").get("ParticipantObjectID") for root in waiting(tmp_path)]
    assert told == [line["study_instance_uid"] for line in ledger.history.audit(limit=10)]
    assert told == [f"1.2.{number}" for number in range(4)]
    assert file.exists()


def test_a_full_spool_says_that_it_stops_and_how_many_were_left_out(audit, ledger, tmp_path):
    trail = audit(more="spool_megabytes = 1")
    folder = tmp_path / "storage" / "audit"
    number = 0
    while not [root for root in waiting(tmp_path)[-1:] if "110133" in etree.tostring(root).decode()]:
        trail.deleted(f"1.2.{number}", {f"1.9.{each}": 1 for each in range(2000)}, reason="age")
        number += 1
        assert number < 50
    for more in range(5):
        trail.deleted(f"1.3.{more}", {CT: 1}, reason="age")
    kept = waiting(tmp_path)
    assert kind(kept[-1]) == ("110113", "12")
    assert [code(root) for root in kept[:-1]] == ["110105"] * (number - 1)  # and not one was dropped

    for path in sorted(folder.glob("[0-9]*")):
        path.unlink()
    time.sleep(1.1)  # the count is a second old at most
    trail.deleted("1.4", {CT: 1}, reason="age")

    started, after = waiting(tmp_path)
    assert started.find("EventIdentification/EventTypeCode").get("csd-code") == "110134"
    assert "6 messages were left out" in started.findtext("EventIdentification/EventOutcomeDescription")
    assert code(after) == "110105"
    assert len(ledger.history.audit(limit=100)) == number + 6  # the ledger has all of them


# -- the wire ---------------------------------------------------------------------------------------------


def send(records: list[bytes], pki, port: int, **options) -> bool:
    place = table(pki, port, **options)
    return syslog.send(records, place.address, client_context(place), place.tls_name or "localhost")


def test_a_collector_gets_every_octet_of_messages_of_any_length(collector, pki):
    there = collector()
    records = [b"\xc3\xa4" * size for size in (1, 1024, 16384, 100_000)]

    assert send(records, pki, there.port)

    assert there.received == records


@pytest.mark.parametrize(
    "options",
    [
        {"tls_ca": "stranger.pem"},  # it is somebody else
        {"tls_name": "collector.hospital.example"},
        {"tls_certificate": "intruder.pem", "tls_key": "intruder.key"},  # it does not know us
    ],
)
def test_a_collector_that_is_not_who_it_should_be_gets_nothing(collector, pki, options):
    there = collector()
    options = {key: pki / value if value.endswith(("pem", "key")) else value for key, value in options.items()}

    with pytest.raises(syslog.CollectorUnavailable):
        send([b"secret"], pki, there.port, **options)

    assert there.received == []


def test_a_collector_that_dies_before_it_has_read_has_not_got_it(collector, pki):
    there = collector()
    there.reads = False

    with pytest.raises(syslog.CollectorUnavailable):
        send([b"x" * 1000], pki, there.port)


def test_a_collector_that_had_closed_already_has_not_got_it(pki):
    """Its side ends before ours: that end is no answer to what we had not sent yet."""
    context = Collector(pki).context
    listener = socket.create_server((HERE, 0))

    def closing() -> None:
        plain, _ = listener.accept()
        connection = context.wrap_socket(plain, server_side=True)
        connection.recv(100)
        connection.close()

    thread = threading.Thread(target=closing)
    thread.start()
    place = table(pki, listener.getsockname()[1])
    sock = socket.create_connection(place.address)
    connection = client_context(place).wrap_socket(sock, server_hostname="localhost")
    connection.sendall(b"hello")
    thread.join(10)
    time.sleep(0.2)  # its FIN is here

    connection.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_CORK, 1
    )  # what we send is on its way for a while, as on a long wire
    connection.sendall(b"never read")
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the moment at which the reset comes
        syslog._ended(connection)

    connection.close()
    listener.close()


def test_a_collector_that_never_ends_its_connection_gets_each_message_once(collector, pki, monkeypatch):
    monkeypatch.setattr(syslog, "_FAREWELL", 1.0)
    there = collector()
    there.answers = False

    assert not send([b"one", b"two"], pki, there.port)

    assert there.received == [b"one", b"two"]


# -- sent -------------------------------------------------------------------------------------------------


def studies(roots) -> list[str]:
    return [
        root.find("ParticipantObjectIdentification").get("ParticipantObjectID")
        for root in roots
        if code(root) == "110105"
    ]


def test_messages_arrive_exactly_and_in_order_when_the_collector_comes_back(audit, collector, eventually, free_port):
    port = free_port()
    trail = audit(port)
    trail.start()
    for number in range(30):
        trail.deleted(f"1.2.{number}", {CT: 1}, reason="age")
    assert trail.waiting() == 31

    there = collector(port)
    eventually(lambda: len(there.received) >= 31, seconds=20)
    there.stop()
    for number in range(30, 60):
        trail.deleted(f"1.2.{number}", {CT: 1}, reason="age")
    again = collector(port)
    eventually(lambda: trail.waiting() == 0, seconds=20)
    trail.stop()

    assert studies(there.messages + again.messages) == [f"1.2.{number}" for number in range(60)]
    assert [code(root) for root in again.messages][-1] == "110100"  # that it stopped is said before it is gone


def test_messages_that_a_collector_did_not_read_come_again(audit, collector, eventually):
    there = collector()
    there.reads = False
    trail = audit(there.port)
    trail.start()
    trail.deleted("1.2.3", {CT: 1}, reason="age")
    eventually(lambda: there.connections >= 2, seconds=20)

    there.reads = True
    eventually(lambda: trail.waiting() == 0, seconds=30)
    trail.stop()

    assert studies(there.messages) == ["1.2.3"]


def test_a_collector_without_an_authority_to_verify_it_by_is_a_mistake_in_the_settings(ledger, tmp_path):
    text = f'[node]\nstorage = "{tmp_path}"\n[audit]\ncollector = "localhost:6514"\n'

    with pytest.raises(SettingsError, match=r"audit.collector needs tls_ca, or tls.ca"):
        Audit(parse(text), ledger).start()


# -- the node's own edges ---------------------------------------------------------------------------------


def knock(port: int, *datasets, calling: str = "SCANNER", user: str = "", abort: bool = False) -> None:
    entity = AE(ae_title=calling)
    entity.add_requested_context(CT, EXPLICIT)
    items = []
    if user:
        item = UserIdentityNegotiation()
        item.user_identity_type, item.primary_field, item.secondary_field = 2, user.encode(), b"open sesame"
        items.append(item)
    association = entity.associate(HERE, port, ext_neg=items)
    if association.is_established:
        for dataset in datasets:
            association.send_c_store(as_file(dataset))
        association.abort() if abort else association.release()


def test_what_the_receiver_does_is_reported(receiver, pki, eventually, tmp_path, capfd):
    peer = f'[peer.S]\nae_title = "SCANNER"\nhost = "{HERE}"\nport = 1\nuser = "scanner"\npasscode = "open sesame"\n'
    limits = 'calling_ae_titles = ["SCANNER", "OTHER"]\n'
    text = settings(pki, 1).replace("[audit]", limits + "[audit]")
    node = receiver(text + peer)

    knock(node.port, ct(1), ct(2), ct(1), ct(2, pixel=3), ct(1, study="b"), calling="OTHER")
    eventually(lambda: len(waiting(tmp_path)) >= 4)
    knock(node.port, ct(5), calling="OTHER", abort=True)
    eventually(lambda: len(waiting(tmp_path)) >= 5)
    knock(node.port, user="scanner")
    knock(node.port, user="Zzyzx^Secretive")
    knock(node.port, calling="STRANGER")
    knock(node.port, calling="STRANGER")

    eventually(lambda: len(waiting(tmp_path)) >= 8)
    told = waiting(tmp_path)
    assert [kind(root) for root in told] == [
        ("110104", "0"),
        ("110104", "0"),
        ("110104", "4"),
        ("110104", "0"),
        ("110104", "0"),
        ("110114", "0"),
        ("110114", "4"),
        ("110113", "8"),
    ]
    first = told[0]
    assert first.find("EventIdentification").get("EventActionCode") == "C"
    assert [each.get("AlternativeUserID") for each in first.findall("ActiveParticipant")] == [
        "AETITLES=OTHER",
        "AETITLES=DICOM_NODE",
    ]
    study = first.find("ParticipantObjectIdentification")
    assert study.get("ParticipantObjectID") == uid("study")
    assert study.find(".//SOPClass").attrib == {"UID": CT, "NumberOfInstances": "2"}
    assert "not released" in told[4].findtext("EventIdentification/EventOutcomeDescription")
    everything = str(node.ledger.history.recent_events(limit=1000)) + str(capfd.readouterr())
    assert not [value for value in (*IDENTITY.values(), "open sesame") if value in everything]


def test_a_node_that_was_killed_while_it_received_says_so_in_its_next_life(receiver, pki, ledger):
    node = receiver(settings(pki, 1))
    entity = AE(ae_title="SCANNER")
    entity.add_requested_context(CT, EXPLICIT)
    association = entity.associate(HERE, node.port)
    association.send_c_store(as_file(ct(1)))
    association.send_c_store(as_file(ct(2)))

    assert node.recorder.flush()
    assert ledger.arrivals.interrupted("node") == [Interrupted(uid("study"), "SCANNER", 2)]
    assert ledger.arrivals.interrupted("another") == []

    association.release()


# -- a real peer ------------------------------------------------------------------------------------------

RSYSLOG = """
global(workDirectory="{folder}" maxMessageSize="64k"
  defaultNetstreamDriver="gtls" defaultNetstreamDriverCAFile="{pki}/ca.pem"
  defaultNetstreamDriverCertFile="{pki}/other.pem" defaultNetstreamDriverKeyFile="{pki}/other.key"
  parser.escapeControlCharactersOnReceive="off")
module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="x509/certvalid")
template(name="parts" type="string" string="%pri%|%app-name%|%msgid%|%hostname%|%msg%\\n")
input(type="imtcp" address="127.0.0.1" port="{port}" ruleset="audit")
ruleset(name="audit") {{ action(type="omfile" file="{folder}/received" template="parts" asyncWriting="off") }}
"""


class Rsyslog:
    """rsyslogd with a certificate of its own; it wants ours."""

    def __init__(self, executable: str, folder: Path, pki: Path, port: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self._port, self._executable = folder, port, executable
        (folder / "rsyslog.conf").write_text(RSYSLOG.format(folder=folder, pki=pki, port=port))

    def start(self) -> None:
        command = [self._executable, "-n", "-f", self.folder / "rsyslog.conf", "-i", self.folder / "pid"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex((HERE, self._port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def lines(self) -> list[list[str]]:
        path = self.folder / "received"
        return [line.split("|", 4) for line in path.read_text("utf-8").splitlines()] if path.exists() else []

    @property
    def studies(self) -> list[str]:
        return studies(etree.fromstring(line[4].lstrip(" \ufeff").encode()) for line in self.lines)


@pytest.mark.peer("rsyslogd")
def test_rsyslog_takes_every_message_in_order_also_when_it_was_away(audit, pki, tool, tmp_path, eventually, free_port):
    there = Rsyslog(tool("rsyslogd"), tmp_path / "rsyslog", pki, free_port())
    trail = audit(there._port)
    trail.start()
    large = {f"1.9.{number}": number for number in range(700)}
    for number in range(40):
        trail.deleted(f"1.2.{number}", large if number == 20 else {CT: 1}, reason="Änderung")

    there.start()
    try:
        eventually(lambda: trail.waiting() == 0, seconds=30)
        for number in range(40, 60):
            trail.deleted(f"1.2.{number}", {CT: 1}, reason="age")
        eventually(lambda: trail.waiting() == 0, seconds=30)
        trail.stop()
        eventually(lambda: len(there.lines) >= 62, seconds=20)
    finally:
        there.kill()

    assert there.studies == [f"1.2.{number}" for number in range(60)]
    assert {tuple(line[:3]) for line in there.lines} == {("85", "dicom-node", "DICOM+RFC3881")}
    assert max(len(line[4].encode()) for line in there.lines) > 32768
    roots = [etree.fromstring(line[4].lstrip(" \ufeff").encode()) for line in there.lines]
    for root in roots:
        SCHEMA.assertValid(root)
    assert [code(root) for root in (roots[0], roots[-1])] == ["110100", "110100"]


@pytest.mark.peer("rsyslogd")
def test_whenever_rsyslog_is_killed_no_message_that_left_the_spool_is_missing(
    audit, pki, tool, tmp_path, eventually, free_port
):
    there = Rsyslog(tool("rsyslogd"), tmp_path / "rsyslog", pki, free_port())
    there.start()
    trail = audit(there._port)
    trail.start()
    wanted = []
    for life in range(3):
        for number in range(60):
            wanted.append(f"1.{life + 2}.{number}")
            trail.deleted(wanted[-1], {CT: 1}, reason="age")
            if number == 35:
                there.kill()
        there.start()
    eventually(lambda: trail.waiting() == 0, seconds=60)
    trail.stop()
    eventually(lambda: there.studies[-1:] == wanted[-1:], seconds=20)
    there.kill()

    assert list(dict.fromkeys(there.studies)) == wanted
    assert os.path.getsize(there.folder / "received") > 0


def not_yet_recorded(folder):
    """What has bytes in the inbox; a name may go between being listed and being looked at."""
    found = []
    for path in folder.rglob("arrived/*"):
        with suppress(FileNotFoundError):
            if path.stat().st_size:
                found.append(path)
    return found


@pytest.mark.peer("rsyslogd")
def test_what_a_killed_node_had_to_say_arrives_in_its_next_life(pki, tool, tmp_path, eventually, free_port):
    there = Rsyslog(tool("rsyslogd"), tmp_path / "rsyslog", pki, free_port())
    trail = settings(pki, there._port).partition("[audit]")[2]
    broker = 'broker = "redis://127.0.0.1:1/0"'  # none, and no workers
    node = NodeProcess(tmp_path / "node", pacs_port=1, node=broker, peer=f"[audit]{trail}")
    try:
        node.start()
        knock(node.port, ct(1, study="a"), ct(2, study="a"))
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(CT, EXPLICIT)
        held = entity.associate(HERE, node.port)
        assert held.send_c_store(as_file(ct(1, study="b"))).Status == 0x0000
        eventually(lambda: len(waiting(tmp_path / "node")) == 2)
        eventually(lambda: not not_yet_recorded(tmp_path / "node"))
        node.kill()
        there.start()
        node.start()
        assert node.terminate() == 0
        eventually(lambda: len(there.lines) >= 5, seconds=20)
    finally:
        node.end()
        if hasattr(there, "process"):
            there.kill()

    roots = [etree.fromstring(line[4].lstrip(" \ufeff").encode()) for line in there.lines]
    told = [kind(root) for root in roots]
    start = ("110100", "0")
    assert told == [start, ("110104", "0"), ("110104", "8"), start, start]  # the last one stops
    assert [
        root.find("EventIdentification/EventTypeCode").get("csd-code") for root in roots if kind(root) == start
    ] == [
        "110120",
        "110120",
        "110121",
    ]
    subjects = [root.find("ParticipantObjectIdentification").get("ParticipantObjectID") for root in roots[1:3]]
    assert subjects == [uid("a"), uid("b")]
    everywhere = (
        b"".join(
            path.read_bytes()
            for path in (tmp_path / "node").rglob("*")
            if path.is_file() and "studies" not in path.parts
        )
        + (tmp_path / "rsyslog" / "received").read_bytes()
    )
    assert not [value for value in IDENTITY.values() if value.encode() in everywhere]
