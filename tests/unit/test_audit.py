"""Audit messages, their envelope, and the spool that they wait in."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lxml import etree

from dicom_node.audit import Transfers, messages, syslog
from dicom_node.audit.keeping import Keeping, Report
from dicom_node.audit.messages import Action, Indicator, Patient, Source, encode
from dicom_node.audit.outbox import Outbox
from dicom_node.audit.repeats import Alarm, Repeats
from dicom_node.entities import Header
from dicom_node.errors import LedgerRefused, LedgerUnavailable, SpoolFull
from dicom_node.ledger.journal import Subject

SCHEMA = etree.RelaxNG(etree.parse(Path(__file__).parents[1] / "audit-message.rng"))
NODE = messages.node("4711", "DICOM_NODE", "node1")
SCANNER = messages.peer("SCANNER", "10.1.2.3", role=messages.SOURCE_ROLE, asks=True)
STUDY = messages.study("1.2.3", {"1.2.840.10008.5.1.4.1.1.2": 12})
AT = 1_700_000_000.25


def read(message: messages.Message) -> etree._Element:
    """Encode a message; it is valid, or the test fails."""
    root = etree.fromstring(encode(message, Source("NODE", "Hospital")))
    SCHEMA.assertValid(root)
    return root


def alert(**options) -> messages.Message:
    return messages.alert(AT, messages.NODE_AUTHENTICATION, NODE, "refused", indicator=Indicator.SERIOUS, **options)


# -- XML --------------------------------------------------------------------------------------------------


def test_a_transfer_says_who_sent_what_to_whom_and_how_it_ended():
    root = read(
        messages.transferred(
            messages.INSTANCES_TRANSFERRED, AT, SCANNER, NODE, [STUDY], None, action=Action.CREATE, description="all"
        )
    )

    event = root.find("EventIdentification")
    assert event.attrib == {
        "EventActionCode": "C",
        "EventDateTime": "2023-11-14T22:13:20.250+00:00",
        "EventOutcomeIndicator": "0",
    }
    assert event.find("EventID").attrib == {
        "csd-code": "110104",
        "codeSystemName": "DCM",
        "originalText": "DICOM Instances Transferred",
    }
    assert event.findtext("EventOutcomeDescription") == "all"
    source, _ = root.findall("ActiveParticipant")
    assert source.attrib == {
        "UserID": "SCANNER",
        "AlternativeUserID": "AETITLES=SCANNER",
        "UserIsRequestor": "true",
        "NetworkAccessPointID": "10.1.2.3",
        "NetworkAccessPointTypeCode": "2",
    }
    assert source.find("RoleIDCode").get("csd-code") == "110153"
    assert root.find("AuditSourceIdentification").attrib == {
        "AuditEnterpriseSiteID": "Hospital",
        "AuditSourceID": "NODE",
    }
    (study,) = root.findall("ParticipantObjectIdentification")
    assert study.get("ParticipantObjectID") == "1.2.3"
    assert study.find("ParticipantObjectIDTypeCode").get("csd-code") == "110180"
    sop_class = study.find("ParticipantObjectDescription/SOPClass")
    assert sop_class.attrib == {"UID": "1.2.840.10008.5.1.4.1.1.2", "NumberOfInstances": "12"}


def test_a_patient_is_a_person_in_the_role_of_a_patient():
    root = read(messages.deleted(AT, NODE, STUDY, Patient("4711", "Müller^Änne"), "retention"))

    _, patient = root.findall("ParticipantObjectIdentification")
    assert (patient.get("ParticipantObjectTypeCode"), patient.get("ParticipantObjectTypeCodeRole")) == ("1", "1")
    assert patient.find("ParticipantObjectIDTypeCode").get("codeSystemName") == "RFC-3881"
    assert patient.get("ParticipantObjectID") == "4711"
    assert patient.findtext("ParticipantObjectName") == "Müller^Änne"


def test_a_machine_is_named_as_one_and_an_address_as_one():
    def point(text: str) -> str:
        return (
            read(messages.activity(AT, messages.node("1", "NODE", text), is_start=True))
            .find("ActiveParticipant")
            .get("NetworkAccessPointTypeCode")
        )

    assert [point(text) for text in ("node1.hospital", "10.0.0.1", "fe80::1%eth0", "::1")] == ["1", "2", "2", "2"]


@pytest.mark.parametrize("hostile", ["<a/>&\"'", "\0\x01\x1b[31m", "\ud800", "]]>", "\u202eABC", "x" * 5000, ""])
def test_whatever_a_peer_calls_itself_the_message_stays_valid(hostile):
    participant = messages.peer(hostile, "10.0.0.9")
    message = messages.login(AT, hostile, "10.0.0.9", participant, is_admitted=False, description=hostile)

    read(message)
    read(alert(performer=participant, node_id="10.0.0.9"))


def test_the_schema_of_these_tests_refuses_what_is_wrong():
    root = etree.fromstring(encode(alert(node_id="10.0.0.9"), Source("NODE")))
    assert SCHEMA.validate(root)
    for path, name, value in [
        ("EventIdentification", "EventOutcomeIndicator", "1"),
        ("EventIdentification", "EventDateTime", "yesterday"),
        ("ParticipantObjectIdentification", "ParticipantObjectTypeCode", "9"),
        ("ParticipantObjectIdentification/ParticipantObjectDetail", "value", "not base64!"),
    ]:
        wrong = etree.fromstring(etree.tostring(root))
        wrong.find(path).set(name, value)
        assert not SCHEMA.validate(wrong), name
    wrong = etree.fromstring(etree.tostring(root))
    wrong.find("ParticipantObjectIdentification").remove(wrong.find(".//ParticipantObjectName"))
    assert not SCHEMA.validate(wrong)


def test_what_an_association_brought_is_told_apart_by_study_and_by_what_became_of_it():
    def header(study: str, sop_class: str) -> Header:
        return Header(sop_class, "1.9", study, "1.8", "CT", 1, None, None, False)

    transfers = Transfers()
    for study, sop_class, outcome in [
        ("1.1", "CT", "stored"),
        ("1.1", "CT", "stored"),
        ("1.1", "SEG", "stored"),
        ("1.1", "CT", "duplicate"),
        ("1.2", "CT", "quarantined"),
    ]:
        transfers.add(header(study, sop_class), outcome)

    assert [(study, dict(counts), action, indicator) for study, counts, action, indicator, _ in transfers] == [
        ("1.1", {"CT": 2, "SEG": 1}, Action.CREATE, Indicator.SUCCESS),
        ("1.1", {"CT": 1}, Action.READ, Indicator.SUCCESS),
        ("1.2", {"CT": 1}, Action.CREATE, Indicator.MINOR),
    ]


# -- syslog -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_warning", "priority"), [(False, 85), (True, 84)])
def test_the_header_is_that_of_rfc_5424_in_facility_10_with_the_mark_of_utf_8(is_warning, priority):
    record = syslog.record(b"<x/>", at=AT, hostname="node 1.hospital", process=42, is_warning=is_warning)

    expected = f"<{priority}>1 2023-11-14T22:13:20.250000Z node1.hospital dicom-node 42 DICOM+RFC3881 - "
    assert record == expected.encode() + b"\xef\xbb\xbf<x/>"


def test_a_frame_counts_octets_not_characters():
    assert syslog.frame("Änne".encode()) == b"5 \xc3\x84nne"


# -- repeats ----------------------------------------------------------------------------------------------


def test_an_alarm_that_repeats_is_told_once_and_then_counted():
    repeats, alarm = Repeats(), Alarm("rejected", "10.0.0.9")

    assert [repeats.is_new(alarm, 100.0 + second) for second in range(50)] == [True] + 49 * [False]
    assert repeats.due(155.0) == []
    assert repeats.due(160.0) == [(alarm, 49)]
    assert repeats.is_new(alarm, 161.0)
    assert repeats.due(300.0) == []


def test_a_flood_from_many_addresses_costs_little_and_is_not_silent():
    repeats = Repeats()

    told = sum(repeats.is_new(Alarm("rejected", f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"), 0.0) for n in range(50_000))

    assert told == 1001
    assert repeats.due(60.0) == [(Alarm("rejected", ""), 48_999)]


# -- spool ------------------------------------------------------------------------------------------------


def contents(outbox: Outbox) -> list[bytes]:
    return [path.read_bytes() for path in outbox.waiting()]


def test_messages_wait_in_order_and_are_nobody_elses(tmp_path):
    outbox = Outbox(tmp_path / "audit", limit=1 << 20)

    for number in range(20):
        outbox.put(b"%d" % number)

    assert contents(outbox) == [b"%d" % number for number in range(20)]
    assert stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "audit").iterdir()} == {0o600}


def test_a_clock_that_is_set_back_changes_no_order(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path / "audit", limit=1 << 20)
    outbox.put(b"first")
    monkeypatch.setattr(time, "time_ns", lambda: 1)

    outbox.put(b"second")
    (tmp_path / "audit" / "lock").unlink()  # as after a power cut
    Outbox(tmp_path / "audit", limit=1 << 20).put(b"third")

    assert contents(outbox) == [b"first", b"second", b"third"]


def test_a_full_spool_takes_no_more_and_drops_nothing(tmp_path):
    outbox = Outbox(tmp_path / "audit", limit=25)
    outbox.put(b"a" * 10)
    outbox.put(b"b" * 10)

    with pytest.raises(SpoolFull, match="spool_megabytes"):
        outbox.put(b"c" * 10)

    assert contents(outbox) == [b"a" * 10, b"b" * 10]
    outbox.put(b"c" * 10, beyond_limit=True)
    outbox.remove(outbox.waiting())
    monotonic = time.monotonic()
    while not outbox.has_room(10):  # the count is a second old at most
        assert time.monotonic() < monotonic + 5
        time.sleep(0.05)


WRITER = """
import sys
from pathlib import Path
from dicom_node.audit.keeping import Keeping, Report
from dicom_node.audit.outbox import Outbox
outbox, name, number = Outbox(Path(sys.argv[1]), limit=1 << 30), sys.argv[2], 0
while True:
    outbox.put(f"{name} {number} ".encode() + b"x" * 5000)
    print(number, flush=True)
    number += 1
"""


def test_what_was_put_is_there_whole_and_in_order_whoever_is_killed(tmp_path):
    folder = tmp_path / "audit"
    outbox = Outbox(folder, limit=1 << 30)
    promised: dict[str, int] = {}
    for life in range(2):
        writers = {
            f"{life}-{which}": subprocess.Popen(
                [sys.executable, "-c", WRITER, str(folder), f"{life}-{which}"],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.getcwd()},
            )
            for which in range(2)
        }
        for writer in writers.values():
            writer.stdout.readline()
        seen: list[Path] = []
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            now = outbox.waiting()
            assert now[: len(seen)] == seen  # whoever sends in this order overtakes nobody
            seen = now
        for name, writer in writers.items():
            writer.send_signal(signal.SIGKILL)
            said = writer.communicate()[0].splitlines()
            promised[name] = int(said[-1]) if said else 0

    outbox.sweep()
    kept: dict[str, list[int]] = {}
    for content in contents(outbox):
        name, number, rest = content.decode().split(" ")
        assert len(rest) == 5000
        kept.setdefault(name, []).append(int(number))
    for name, last in promised.items():
        assert kept[name] == list(range(len(kept[name])))
        assert len(kept[name]) > last  # one more may be there than its writer came to say
    assert sum(map(len, kept.values())) > 40
    assert not [path for path in folder.iterdir() if not re.fullmatch(r"\d{20}|lock", path.name)]


# -- what is made durable together ------------------------------------------------------------------------


def report(name: str, number: int) -> Report:
    return Report(name, AT + number, Subject("1.2.3"), f"{number} {name}".encode(), {"number": number})


def lines(ledger) -> list[tuple[str, int]]:
    found = [(event["name"], event["fields"]["number"]) for event in ledger.history.events_of("1.2.3")]
    return sorted(found, key=lambda each: each[1])


@pytest.fixture
def outbox(tmp_path):
    return Outbox(tmp_path / "audit", limit=1 << 20)


@pytest.fixture
def keeping(ledger, outbox):
    return Keeping(outbox, ledger, lambda kind, words, indicator: words.encode())


def said(outbox) -> list[bytes]:
    return [path.read_bytes() for path in outbox.waiting()]


def test_what_is_reported_together_is_one_transaction(ledger, keeping, monkeypatch):
    transactions = []
    note_all = ledger.history.note_all
    monkeypatch.setattr(ledger.history, "note_all", lambda notes: (transactions.append(len(notes)), note_all(notes)))

    keeping.add([report("received", number) for number in range(250)])
    keeping.add([report("received", 250)])

    assert transactions == [100, 100, 50, 1]
    assert lines(ledger) == [("received", number) for number in range(251)]


def test_one_that_the_ledger_never_takes_keeps_no_other_back_and_none_is_doubled(ledger, outbox, keeping, monkeypatch):
    note_all = ledger.history.note_all

    def picky(notes):
        if any(note.name == "odd" for note in notes):
            raise LedgerRefused("not this one")
        note_all(notes)

    monkeypatch.setattr(ledger.history, "note_all", picky)
    keeping.add([report(name, number) for number, name in enumerate(["received", "received", "odd", "received"])])

    assert lines(ledger) == [("received", 0), ("received", 1), ("received", 3)]
    assert said(outbox) == [b"0 received", b"1 received", b"2 odd", b"3 received"]


def test_a_ledger_that_is_away_gets_all_of_them_later_and_the_outbox_none_twice(ledger, outbox, keeping, monkeypatch):
    def away(_notes):
        raise LedgerUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(ledger.history, "note_all", away)
        keeping.add([report("received", number) for number in range(3)])
        keeping.add([report("received", 3)])
    assert len(said(outbox)) == 4

    keeping.keep()

    assert lines(ledger) == [("received", number) for number in range(4)]
    assert said(outbox) == [f"{number} received".encode() for number in range(4)]
