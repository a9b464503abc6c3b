"""What the ledger deletes, and what it does not; `tests/integration/test_postgres.py` holds PostgreSQL to the same."""

from __future__ import annotations

import pytest

from dicom_node.commitment import Reference, Report, Request
from dicom_node.ledger import Ledger
from dicom_node.ledger.schema import metadata
from dicom_node.lifecycle import Happening, Kind, Patience, State
from dicom_node.retention import Ground
from tests.unit.test_ledger import ASSOCIATION, LEASE, claim, complete, inference, instance, receive, result

PATIENCE = Patience(1.0, 1.0, 14.0)


def going(_study):
    return Ground.AGE


def delete(ledger: Ledger, study: str = "1.2", *, judge=going, set_aside=lambda *_: None, number: str = "d1"):
    return ledger.departures.delete(study, number, node_id="node", judge=judge, set_aside=set_aside, now=99.0)


def delivered(ledger: Ledger, series: str = "1.2.3") -> tuple[int, list[int]]:
    """A study whose two results have gone to two peers; its inference and its deliveries."""
    number = inference(ledger, series)
    held = claim(ledger, number)
    deliveries = ledger.jobs.inferred(held, [result(1), result(2)], now=30.0, seconds={})
    for delivery in deliveries:
        ledger.jobs.ended(claim(ledger, delivery, now=40.0), Happening.FINISHED, now=50.0)
    return number, deliveries


def rows(ledger: Ledger) -> dict[str, int]:
    with ledger._database.reading() as connection:
        return {table.name: len(connection.execute(table.select()).all()) for table in metadata.sorted_tables}


def test_every_row_of_a_study_goes_at_once_and_its_history_stays(ledger):
    delivered(ledger)
    receive(ledger, series="7.7.7", study_instance_uid="7.7")
    events = rows(ledger)["event"]

    departed = delete(ledger)

    ct, seg = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.66.4"
    assert (departed.ground, departed.sop_classes) == (Ground.AGE, {ct: 1, seg: 2})
    left = rows(ledger)
    assert left == {
        **dict.fromkeys(left, 0), "series": 1, "instance": 1, "event": events + 1, "deletion": 1
    }  # fmt: skip
    story = ledger.history.events_of("1.2")
    assert story[0]["name"] == "series.opened"
    assert story[-1]["name"] == "study.deleted"
    assert story[-1]["fields"] == {"ground": "age", "instances": 1, "results": 2, "bytes": 1020}


def test_no_table_that_refers_to_a_study_is_forgotten():
    referring = {
        table.name for table in metadata.sorted_tables for key in table.foreign_keys if key.column.table.name in
        ("series", "job", "instance", "result")
    }  # fmt: skip

    assert referring == {"instance", "job", "result", "commitment"}, "ledger/departures.py has to delete from it"


def test_nothing_is_deleted_where_the_files_cannot_be_moved(ledger):
    delivered(ledger)
    before = rows(ledger)

    def broken(*_paths):
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        delete(ledger, set_aside=broken)

    assert rows(ledger) == before
    assert ledger.departures.departed("d1") is None


def test_the_paths_of_every_file_are_handed_over_before_the_commit(ledger):
    delivered(ledger)
    seen = []

    delete(ledger, set_aside=lambda *paths: seen.append(paths))

    assert seen == [(["p/1.2.3.1"], ["results/1.dcm", "results/2.dcm"])]
    assert ledger.departures.departed("d1") is not None
    ledger.departures.files_are_gone(node_id="other")
    assert ledger.departures.departed("d1") is not None
    ledger.departures.files_are_gone(node_id="node")
    assert ledger.departures.departed("d1") is None


def test_what_is_judged_is_the_study_as_it_is_within_the_transaction(ledger):
    delivered(ledger)
    judged = []

    assert delete(ledger, judge=lambda study: judged.append(study)) is None

    (study,) = judged
    assert (study.last_activity, study.is_complete, study.is_held, study.promised_at) == (50.0, True, False, None)
    assert sorted((work.kind, work.state) for work in study.work) == [
        (Kind.DELIVER, State.DONE), (Kind.DELIVER, State.DONE), (Kind.INFER, State.DONE)
    ]  # fmt: skip
    assert delete(ledger, "no.such.study") is None


def test_a_late_instance_and_an_open_association_are_seen(ledger):
    delivered(ledger)
    receive(ledger, 2, now=60.0)
    (late,) = ledger.departures.studies(["1.2"])
    assert (late.is_complete, late.is_held, late.last_activity) == (False, False, 60.0)

    ledger.arrivals.record([(instance(3), ASSOCIATION, 70.0)], node_id="node", now=70.0)
    assert ledger.departures.studies(["1.2"])[0].is_held


def test_what_a_peer_has_and_has_not_committed_is_counted(ledger):
    number = inference(ledger)
    first, _second = ledger.jobs.inferred(claim(ledger, number), [result(1), result(2)], now=30.0, seconds={})
    held = claim(ledger, first, now=40.0)
    ledger.commitments.ask(held, "9.1", ["2.25.1", "2.25.2"], now=41.0)
    ledger.commitments.handed_over(held, now=42.0, ask_again_at=1e9, patience=PATIENCE, detail="")

    def counted():
        (study,) = ledger.departures.studies(["1.2"])
        return {(work.state, work.asked, work.committed) for work in study.work if work.kind is Kind.DELIVER}

    assert counted() == {(State.COMMITTING, 2, 0), (State.QUEUED, 0, 0)}
    seg = Reference("1.2.840.10008.5.1.4.1.1.66.4", "2.25.1")
    ledger.commitments.reported(Report("9.1", (seg,), {}), now=50.0, patience=PATIENCE)
    assert counted() == {(State.COMMITTING, 2, 1), (State.QUEUED, 0, 0)}


def test_a_promise_is_on_record_and_only_about_what_is_there(ledger):
    receive(ledger)

    assert ledger.commitments.promise(["1.2.3.1", "9.9"], now=77.0) == {"1.2.3.1"}

    assert ledger.departures.studies(["1.2"])[0].promised_at == 77.0


def test_the_longest_silent_comes_first_and_the_young_not_at_all(ledger):
    for number, at in ((1, 30.0), (2, 10.0), (3, 20.0)):
        receive(ledger, series=f"{number}.1", study_instance_uid=f"{number}", now=at)
    receive(ledger, series="2.2", study_instance_uid="2", now=25.0)  # the study's latest series decides

    assert ledger.departures.candidates(silent_since=25.0) == ["3", "2"]


def test_a_study_that_is_sent_again_after_its_deletion_is_new(ledger):
    first, _ = delivered(ledger)
    delete(ledger)

    assert not ledger.arrivals.held(["1.2.3.1"])
    again = inference(ledger)

    assert again > first, "a number is never given twice: messages and history know jobs by it"
    assert [event["name"] for event in ledger.history.events_of_job(again)] == ["job.queued"]


def test_old_events_of_what_is_gone_are_forgotten_and_no_others(ledger):
    delivered(ledger)
    receive(ledger, series="7.7.7", study_instance_uid="7.7")
    ledger.history.note("association.rejected", now=2.0)
    ledger.history.note("door.shut", now=500.0)
    delete(ledger)  # at 99

    def forget(before: float) -> list[str]:
        after: int | None = 0
        while after is not None:
            after = ledger.departures.forget_events(before=before, after=after, limit=3)
        return [event["name"] for event in ledger.history.recent_events(limit=100)]

    everything = len(ledger.history.recent_events(limit=100))
    assert len(forget(before=0.5)) == everything
    left = forget(before=99.0)
    assert sorted(left) == ["door.shut", "series.opened", "study.deleted"]
    assert sorted(forget(before=1000.0)) == ["series.opened", "study.deleted"], "the last event keeps its number"


def test_requests_that_have_ended_are_forgotten_and_their_promise_is_not(ledger):
    receive(ledger)
    request = Request("9.9", (Reference("1.2.840.10008.5.1.4.1.1.2", "1.2.3.1"),))
    ledger.commitments.asked(request, calling_ae_title="SCANNER", not_before=1.0, now=1.0)
    (due,) = ledger.commitments.due(now=2.0, limit=9)
    pending = ledger.commitments.pending(due)
    assert ledger.departures.forget_requests(before=1e9) == 0, "it is still to be answered"
    ledger.commitments.promise(["1.2.3.1"], now=2.0)
    ledger.commitments.answered(pending, Report("9.9", request.references, {}), now=3.0, how="")

    assert ledger.departures.forget_requests(before=10.0) == 1
    assert ledger.departures.studies(["1.2"])[0].promised_at == 2.0


def test_a_job_of_a_study_that_is_gone_cannot_be_claimed(ledger):
    receive(ledger)
    (number,) = complete(ledger)
    delete(ledger)

    assert ledger.jobs.claim(number, worker="w", lease=LEASE, now=1000.0) is None
