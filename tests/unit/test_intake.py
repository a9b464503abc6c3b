from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import AllTransferSyntaxes
from sqlalchemy import update
from xxhash import xxh3_128_hexdigest

from dicom_node import native
from dicom_node.errors import InvalidInstance, LedgerUnavailable, SpoolFull
from dicom_node.ledger import schema
from dicom_node.ledger.arrivals import AssociationEnd
from dicom_node.recorder import Outcome, Recorder
from dicom_node.services import Status
from dicom_node.spool import Spool
from tests.datasets import BIG_ENDIAN, DEFLATED, EXPLICIT, IMPLICIT, ct, dataset_bytes_of, encoded, uid


@pytest.fixture
def arrive(intake, association):
    """Makes a dataset durable, with a command that fits it; nothing is recorded yet."""

    def arrive(dataset, *, syntax=EXPLICIT, data=None, association=association, **command):
        return intake.keep(
            memoryview(encoded(dataset, syntax) if data is None else data),
            transfer_syntax_uid=syntax,
            affected_sop_class_uid=command.get("sop_class_uid", str(dataset.SOPClassUID)),
            affected_sop_instance_uid=command.get("sop_instance_uid", str(dataset.SOPInstanceUID)),
            association=association,
        )

    return arrive


@pytest.fixture
def keep(arrive, recorder):
    """Keeps and records a dataset; returns what became of it."""

    def keep(dataset, **how):
        before = Counter(outcomes_of(recorder))
        arrive(dataset, **how)
        recorder.drain()
        (outcome,) = (Counter(outcomes_of(recorder)) - before).elements()
        return outcome

    return keep


def outcomes_of(recorder):
    return sum((brought.outcomes for brought in recorder._brought.values()), Counter())


def one_series(ledger):
    (series,) = ledger.arrivals.open_series()
    return series


def files(spool):
    """Return every file there is something in."""
    return sorted(path for path in spool.storage.rglob("*") if path.is_file() and path.stat().st_size)


def broken(*_args, **_kwargs):
    raise LedgerUnavailable


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED])
def test_the_bytes_are_kept_as_they_came(keep, ledger, spool, syntax):
    data = encoded(ct(), syntax)

    assert keep(ct(), syntax=syntax) is Outcome.STORED

    (instance,) = ledger.arrivals.instances_of(uid("study", "series"))
    content = spool.absolute(instance.path).read_bytes()
    assert dataset_bytes_of(content) == data
    assert instance.digest == xxh3_128_hexdigest(data)
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


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_an_earlier_version_had_it(ledger):
    with ledger._database.writing() as connection:
        connection.execute(update(schema.instance).values(digest=sha256(encoded(ct()))))


def test_what_an_earlier_version_holds_is_still_compared_by_its_own_digest(keep, ledger, spool):
    keep(ct())
    as_an_earlier_version_had_it(ledger)
    (stored,) = ledger.arrivals.instances_of(uid("study", "series"))

    assert spool.is_intact(stored.path, stored.digest)
    assert not spool.is_intact(stored.path, sha256(b"something else"))
    assert keep(ct()) is Outcome.DUPLICATE
    assert keep(ct(pixel=7)) is Outcome.QUARANTINED


def test_what_an_earlier_version_has_acknowledged_and_not_recorded_is_recorded(arrive, ledger, spool):
    data = encoded(ct())
    arrive(ct())
    (path,) = spool.inbox.waiting()
    now = path.read_bytes()
    head = now[144 : now.index(b"\x02\x00\x02\x01OB\0\0") + 8]  # up to the length of what vouches for it
    elements = head + (32).to_bytes(4, "little") + bytes.fromhex(sha256(data))
    earlier = now[:140] + len(elements).to_bytes(4, "little") + elements
    path.write_bytes(earlier + data)

    reborn = Recorder(ledger, Spool(spool.storage), node_id="node")

    assert reborn.recover() == 1
    reborn.drain()
    (stored,) = ledger.arrivals.instances_of(uid("study", "series"))
    assert stored.digest == sha256(data)
    assert spool.is_intact(stored.path, stored.digest)


def test_a_duplicate_after_completion_opens_nothing(keep, ledger, association):
    keep(ct())
    complete(ledger)

    assert keep(ct(), association=replace(association, association_id="second")) is Outcome.DUPLICATE

    assert not ledger.arrivals.open_series()


def test_a_duplicate_restores_a_file_that_is_gone(keep, ledger, spool):
    keep(ct())
    (stored,) = ledger.arrivals.instances_of(uid("study", "series"))
    spool.absolute(stored.path).unlink()

    assert keep(ct()) is Outcome.DUPLICATE

    assert dataset_bytes_of(spool.absolute(stored.path).read_bytes()) == encoded(ct())


def test_an_instance_that_is_deleted_while_it_comes_again_is_new(arrive, keep, recorder, ledger, monkeypatch):
    keep(ct())
    held = ledger.arrivals.held
    monkeypatch.setattr(ledger.arrivals, "held", lambda uids: (held(uids), delete_everything(ledger))[0])
    arrive(ct())

    with pytest.raises(LedgerUnavailable):
        recorder.drain()
    monkeypatch.undo()
    recorder.drain()

    assert one_series(ledger).received == 1
    assert ledger.arrivals.held([uid("study", "series", 1)])


def delete_everything(ledger):
    with ledger._database.writing() as connection:
        for table in (schema.holding, schema.instance, schema.series):
            connection.execute(table.delete())


def test_a_duplicate_on_an_open_series_holds_it_open(keep, ledger, association):
    keep(ct())
    ledger.arrivals.associations_ended([AssociationEnd(association.association_id, False, 1001.0)])

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


def test_what_arrives_while_the_ledger_is_away_is_durable_and_recorded_later(
    arrive, recorder, ledger, spool, monkeypatch
):
    monkeypatch.setattr(ledger.arrivals, "record", broken)
    arrive(ct())

    with pytest.raises(LedgerUnavailable):
        recorder.drain()

    assert len(spool.inbox.waiting()) == 1
    monkeypatch.undo()
    recorder.drain()
    assert one_series(ledger).received == 1
    assert not spool.inbox.waiting()


def test_a_commit_whose_answer_got_lost_is_recorded_once(arrive, recorder, ledger, spool, monkeypatch):
    record = ledger.arrivals.record

    def lost(*args, **kwargs):
        record(*args, **kwargs)
        raise LedgerUnavailable

    monkeypatch.setattr(ledger.arrivals, "record", lost)
    arrive(ct())
    with pytest.raises(LedgerUnavailable):
        recorder.drain()
    monkeypatch.undo()

    recorder.drain()

    assert one_series(ledger).received == 1
    assert not spool.inbox.waiting()


def test_too_much_that_waits_for_the_ledger_shuts_the_door(arrive, ledger, monkeypatch):
    monkeypatch.setattr("dicom_node.recorder._BACKLOG", 2)
    arrive(ct(1))
    arrive(ct(2))

    with pytest.raises(LedgerUnavailable):
        arrive(ct(3))


def test_the_next_life_records_what_the_last_one_acknowledged(arrive, ledger, spool):
    arrive(ct(1))
    arrive(ct(2))

    reborn = Recorder(ledger, Spool(spool.storage), node_id="node")

    assert reborn.recover() == 2
    reborn.drain()
    series = one_series(ledger)
    assert (series.received, series.calling_ae_title, series.held_open, series.released) == (2, "SCANNER", False, False)
    (first, second) = ledger.arrivals.instances_of(uid("study", "series"))
    assert first.digest == xxh3_128_hexdigest(encoded(ct(1)))
    assert dataset_bytes_of(spool.absolute(second.path).read_bytes()) == encoded(ct(2))
    assert not spool.inbox.waiting()


def test_what_a_broken_disk_keeps_in_the_inbox_is_on_record_and_taken_out_later(
    keep, spool, ledger, monkeypatch, in_python
):
    unlink, refusals = os.unlink, [OSError(errno.EIO, "Input/output error")]

    def unlinks(path, **options):
        if Path(path).parent == spool.inbox.folder and refusals:
            raise refusals.pop()
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", unlinks)
    assert keep(ct()) is Outcome.STORED
    assert len(spool.inbox.waiting()) == 1
    assert keep(ct(2)) is Outcome.STORED
    assert not spool.inbox.waiting()
    assert one_series(ledger).received == 2


def test_the_next_life_finds_what_was_recorded_but_not_taken_out_a_duplicate(
    arrive, recorder, ledger, spool, monkeypatch
):
    arrive(ct())
    monkeypatch.setattr(native, "unlink", broken)  # died between the commit and this
    with pytest.raises(LedgerUnavailable):
        recorder.drain()
    monkeypatch.undo()

    reborn = Recorder(ledger, Spool(spool.storage), node_id="node")
    reborn.recover()
    reborn.drain()

    assert one_series(ledger).received == 1
    assert not spool.inbox.waiting()


@pytest.mark.parametrize("torn", [b"", b"\0" * 100, "half", "zeros", "flipped"])
def test_what_a_power_cut_has_torn_is_thrown_away(arrive, ledger, spool, torn):
    arrive(ct())
    (path,) = spool.inbox.waiting()
    content = path.read_bytes()
    path.write_bytes(
        {
            "half": content[: len(content) // 2],
            "zeros": content[:-200] + bytes(200),
            "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        }.get(torn, torn)
    )

    reborn = Recorder(ledger, Spool(spool.storage), node_id="node")

    assert reborn.recover() == 0
    assert not spool.inbox.waiting()


def test_a_file_that_a_crash_left_unrecorded_is_replaced(keep, ledger, spool):
    place = spool.storage / "studies" / uid("study") / uid("study", "series") / f"{uid('study', 'series', 1)}.dcm"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")

    assert keep(ct()) is Outcome.STORED

    assert dataset_bytes_of(place.read_bytes()) == encoded(ct())


def test_a_full_disk_keeps_nothing(arrive, ledger, spool, monkeypatch, in_python):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)

    with pytest.raises(SpoolFull):
        arrive(ct())

    monkeypatch.undo()
    assert not files(spool)


def test_file_and_name_are_on_stable_storage_before_the_row_and_the_place_before_the_inbox_is_emptied(
    arrive, recorder, ledger, spool, monkeypatch, in_python
):
    order = []
    fsync, record, unlink = os.fsync, ledger.arrivals.record, os.unlink

    def synced(descriptor):
        order.append(
            "fsync " + os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{spool.storage}/").partition("/")[0]
        )
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    arrive(ct())
    assert order == ["fsync arrived", "fsync arrived"], "the name, in its folder, then the file"
    order.clear()
    monkeypatch.setattr(ledger.arrivals, "record", lambda *a, **k: (record(*a, **k), order.append("row"))[0])
    monkeypatch.setattr(os, "unlink", lambda path, **k: (order.append("unlink"), unlink(path, **k))[1])

    recorder.drain()

    assert order[-2:] == ["row", "unlink"]
    assert order[-3] == "fsync studies"


def test_the_same_instance_from_many_associations_at_once_is_stored_once(ledger, recorder, association, arrive):
    barrier = threading.Barrier(8)

    def send(number):
        barrier.wait()
        arrive(ct(), association=replace(association, association_id=str(number)))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.drain()

    assert outcomes_of(recorder) == {Outcome.STORED: 1, Outcome.DUPLICATE: 7}
    assert one_series(ledger).received == 1


def test_what_cannot_be_recorded_costs_no_other_instance_and_not_its_own_file(
    arrive, recorder, ledger, spool, monkeypatch
):
    record = ledger.arrivals.record

    def poisoned(received, *args, **kwargs):
        if any(each.header.sop_instance_uid == uid("study", "series", 2) for each, _, _ in received):
            raise KeyError("a defect of ours")
        record(received, *args, **kwargs)

    monkeypatch.setattr(ledger.arrivals, "record", poisoned)
    for number in (1, 2, 3):
        arrive(ct(number))
    recorder._thread.start()
    assert recorder.flush()
    recorder.stop()

    assert one_series(ledger).received == 2
    assert len(spool.inbox.waiting()) == 1


def test_who_wants_all_recorded_waits_for_what_has_been_acknowledged_and_for_nothing_later(recorder):
    recorder._thread.start()
    with recorder.acknowledging():
        assert not recorder.flush(timeout=0.05)
    assert recorder.flush()

    with ExitStack() as earlier, ExitStack() as later, ThreadPoolExecutor() as pool:
        earlier.enter_context(recorder.acknowledging())
        flushed = pool.submit(recorder.flush)
        time.sleep(0.05)
        later.enter_context(recorder.acknowledging())
        assert not flushed.done()
        earlier.close()
        assert flushed.result(5)
    recorder.stop()


def test_the_nodes_own_result_opens_a_series_that_says_so(keep, ledger):
    keep(ct(ManufacturerModelName="dicom-node"))

    assert one_series(ledger).is_own_result


def complete(ledger):
    """Let every series be complete."""
    ledger.arrivals.associations_ended([AssociationEnd("association-1", True, 1000.0)])
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
