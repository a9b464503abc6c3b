from __future__ import annotations

import hashlib
import threading
from dataclasses import replace

import pytest
from pydicom import dcmread
from pydicom.uid import AllTransferSyntaxes

from dicom_node.errors import InvalidInstance, LedgerUnavailable, SpoolFull
from dicom_node.intake import Intake, Outcome
from dicom_node.services import Status
from tests.datasets import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT, ct, dataset_bytes_of, encoded, uid


@pytest.fixture
def keep(intake, association):
    """Keeps a dataset, with a command that fits it."""

    def keep(dataset, *, syntax=EXPLICIT, data=None, intake=intake, association=association, **command):
        return intake.keep(
            memoryview(encoded(dataset, syntax) if data is None else data),
            transfer_syntax_uid=syntax,
            affected_sop_class_uid=command.get("sop_class_uid", str(dataset.SOPClassUID)),
            affected_sop_instance_uid=command.get("sop_instance_uid", str(dataset.SOPInstanceUID)),
            association=association,
        )[0]

    return keep


def one_series(ledger):
    (series,) = ledger.arrivals.open_series()
    return series


def files(spool):
    return sorted(path for path in spool.storage.rglob("*") if path.is_file() and path.name != "node.lock")


def broken(*_args, **_kwargs):
    raise LedgerUnavailable


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED])
def test_the_bytes_are_kept_as_they_came(keep, ledger, spool, syntax):
    data = encoded(ct(), syntax)

    assert keep(ct(), syntax=syntax) is Outcome.STORED

    (instance,) = ledger.arrivals.instances_of(uid("study", "series"))
    content = spool.absolute(instance.path).read_bytes()
    assert dataset_bytes_of(content) == data
    assert instance.sha256 == hashlib.sha256(data).hexdigest()
    assert dcmread(spool.absolute(instance.path)).file_meta.TransferSyntaxUID == syntax


@pytest.mark.parametrize("syntax", [str(uid) for uid in AllTransferSyntaxes])
def test_every_syntax_is_kept_under_its_own_name(keep, spool, syntax):
    data = encoded(ct(), DEFLATED) if syntax.endswith(".205") else None  # JPIP deflate: deflated as a whole
    plain = syntax if syntax in {IMPLICIT, BIG_ENDIAN, DEFLATED} else EXPLICIT

    assert keep(ct(), syntax=syntax, data=data or encoded(ct(), plain)) is Outcome.STORED

    meta = dcmread(files(spool)[0], stop_before_pixels=True, specific_tags=[]).file_meta
    assert meta.TransferSyntaxUID == syntax
    assert meta.SourceApplicationEntityTitle == "SCANNER"


def test_the_first_instance_opens_its_series_and_is_an_event(keep, ledger):
    keep(ct(announced=3))

    series = one_series(ledger)
    assert (series.revision, series.received, series.announced, series.held_open) == (1, 1, 3, True)
    assert [event["name"] for event in ledger.history.recent_events(limit=9)] == ["series.opened"]


def test_the_same_bytes_again_are_a_duplicate_and_no_new_revision(keep, ledger, spool):
    keep(ct())

    assert keep(ct()) is Outcome.DUPLICATE

    assert one_series(ledger).revision == 1
    assert len(files(spool)) == 1


def test_a_duplicate_after_completion_opens_nothing(keep, ledger, association):
    keep(ct())
    complete(ledger)

    assert keep(ct(), association=replace(association, association_id="second")) is Outcome.DUPLICATE

    assert not ledger.arrivals.open_series()


def test_a_duplicate_on_an_open_series_holds_it_open(keep, ledger, association):
    keep(ct())
    ledger.arrivals.association_ended(association.association_id, released=False, now=1001.0)

    keep(ct(), association=replace(association, association_id="second"))

    assert one_series(ledger).held_open


def test_other_bytes_under_the_same_uid_are_set_aside_and_the_first_stay(keep, ledger, spool):
    keep(ct())
    before = ledger.arrivals.instances_of(uid("study", "series"))

    assert keep(ct(pixel=7)) is Outcome.QUARANTINED

    assert ledger.arrivals.instances_of(uid("study", "series")) == before
    first, second = files(spool)
    assert "quarantine" in str(first)
    assert dataset_bytes_of(first.read_bytes()) == encoded(ct(pixel=7))
    assert dataset_bytes_of(second.read_bytes()) == encoded(ct())
    assert ledger.history.recent_events(limit=1)[0]["name"] == "instance.quarantined"


def test_a_late_instance_reopens_its_series(keep, ledger):
    keep(ct(1))
    complete(ledger)

    keep(ct(2))

    assert one_series(ledger).revision == 2
    assert ledger.history.recent_events(limit=1)[0]["name"] == "series.reopened"


@pytest.mark.parametrize(
    ("command", "tag"), [({"sop_class_uid": "1.2.3"}, 0x00080016), ({"sop_instance_uid": "1.2.3"}, 0x00080018)]
)
def test_data_that_contradict_their_command_are_refused(keep, ledger, spool, command, tag):
    with pytest.raises(InvalidInstance) as caught:
        keep(ct(), **command)

    assert caught.value.status == Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS
    assert caught.value.offending_element == tag
    assert len(str(caught.value)) <= 64
    assert not files(spool)
    assert not ledger.arrivals.open_series()


def test_a_ledger_that_is_away_before_the_file_is_written_leaves_nothing(keep, ledger, spool, monkeypatch):
    monkeypatch.setattr(ledger.arrivals, "held", broken)

    with pytest.raises(LedgerUnavailable):
        keep(ct())

    assert not files(spool)
    monkeypatch.undo()
    assert keep(ct()) is Outcome.STORED


def test_a_ledger_that_goes_away_after_the_file_was_written_costs_a_retry(keep, ledger, spool, monkeypatch):
    monkeypatch.setattr(ledger.arrivals, "record", broken)

    with pytest.raises(LedgerUnavailable):
        keep(ct())
    monkeypatch.undo()

    assert not ledger.arrivals.open_series()
    assert keep(ct()) is Outcome.STORED
    assert len(files(spool)) == 1


def test_a_commit_whose_answer_got_lost_is_a_duplicate_the_second_time(keep, ledger, monkeypatch):
    record = ledger.arrivals.record

    def lost(*args, **kwargs):
        record(*args, **kwargs)
        raise LedgerUnavailable

    monkeypatch.setattr(ledger.arrivals, "record", lost)
    with pytest.raises(LedgerUnavailable):
        keep(ct())
    monkeypatch.undo()

    assert keep(ct()) is Outcome.DUPLICATE
    assert one_series(ledger).received == 1


def test_a_file_that_a_crash_left_unrecorded_is_replaced(keep, ledger, spool, monkeypatch):
    monkeypatch.setattr(ledger.arrivals, "record", broken)
    with pytest.raises(LedgerUnavailable):
        keep(ct(pixel=9))
    monkeypatch.undo()

    assert keep(ct()) is Outcome.STORED

    assert dataset_bytes_of(files(spool)[0].read_bytes()) == encoded(ct())


def test_a_full_disk_records_nothing(keep, ledger, spool, monkeypatch):
    def full(*_args, **_kwargs):
        raise SpoolFull

    monkeypatch.setattr(spool, "keep", full)

    with pytest.raises(SpoolFull):
        keep(ct())

    assert not ledger.arrivals.open_series()


def test_the_file_is_on_disk_before_the_ledger_knows_it(keep, ledger, spool, monkeypatch):
    order = []
    written, recorded = spool.keep, ledger.arrivals.record
    monkeypatch.setattr(spool, "keep", lambda *a: (written(*a), order.append("file"))[0])
    monkeypatch.setattr(ledger.arrivals, "record", lambda *a, **k: (recorded(*a, **k), order.append("row"))[0])

    keep(ct())

    assert order == ["file", "row"]


def test_the_same_instance_from_many_associations_at_once_is_stored_once(ledger, spool, association, keep):
    intake = Intake(ledger, spool, node_id="node")
    outcomes, barrier = [], threading.Barrier(8)

    def send(number):
        barrier.wait()
        outcomes.append(keep(ct(), intake=intake, association=replace(association, association_id=str(number))))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == [Outcome.DUPLICATE] * 7 + [Outcome.STORED]
    assert one_series(ledger).received == 1
    assert not intake._locks._locks


def test_the_nodes_own_result_opens_a_series_that_says_so(keep, ledger):
    keep(ct(ManufacturerModelName="dicom-node"))

    assert one_series(ledger).is_own_result


def complete(ledger):
    """Let every series be complete."""
    ledger.arrivals.association_ended("association-1", released=True, now=1000.0)
    for series in ledger.arrivals.open_series():
        made = ledger.jobs.complete(
            series.series_instance_uid,
            revision=series.revision,
            last_activity=series.last_activity,
            reason="test",
            orders=[],
            now=1000.0,
        )
        assert made == []
