"""What the ledger promises; `tests/integration/test_postgres.py` holds PostgreSQL to the same."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import pytest

from dicom_node.entities import AssociationIdentity, Header, Instance
from dicom_node.errors import LedgerUnavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import AssociationEnd, Held
from dicom_node.ledger.moving import LostLease, StoredResult
from dicom_node.lifecycle import Courtesy, Happening, IllegalTransition, Kind, State
from dicom_node.routing import Order, Priority

ASSOCIATION = AssociationIdentity("a1", "SCANNER", "DICOM_NODE", "127.0.0.1")
ORDER = Order("ct_lung", ("PACS", "ARCHIVE"), ("chest",))
DIGEST = "d" * 64
LEASE = 60.0
COURTESY = Courtesy(seconds=3600.0, times=3)


def instance(number: int = 1, series: str = "1.2.3", **header) -> Instance:
    values = {
        "sop_class_uid": "1.2.840.10008.5.1.4.1.1.2",
        "sop_instance_uid": f"{series}.{number}",
        "study_instance_uid": "1.2",
        "series_instance_uid": series,
        "modality": "CT",
        "number_of_frames": 1,
        "announced": None,
        "place": None,
        "is_own_result": False,
    }
    return Instance(Header(**{**values, **header}), "1.2.840.10008.1.2.1", f"p/{series}.{number}", "f" * 64, 1000)


def record(ledger: Ledger, one: Instance, association, *, node_id: str = "node", now: float = 1.0) -> None:
    ledger.arrivals.record([(one, association, now)], node_id=node_id, now=now)


def receive(ledger: Ledger, number: int = 1, series: str = "1.2.3", *, now: float = 1.0, **header) -> None:
    association = replace(ASSOCIATION, association_id=f"a{number}")
    record(ledger, instance(number, series, **header), association, now=now)
    ledger.arrivals.associations_ended([AssociationEnd(association.association_id, True, now)])


def complete(
    ledger: Ledger, series: str = "1.2.3", *, orders=((ORDER, DIGEST),), now: float = 10.0
) -> list[int] | None:
    (found,) = [s for s in ledger.arrivals.open_series() if s.series_instance_uid == series]
    return ledger.jobs.complete(
        series, revision=found.revision, last_activity=found.last_activity, reason="test", orders=list(orders), now=now
    )


def inference(ledger: Ledger, series: str = "1.2.3") -> int:
    receive(ledger, series=series)
    (number,) = complete(ledger, series)
    return number


def prioritised(ledger: Ledger, priority: Priority) -> int:
    series = f"1.11.{priority.value}"
    receive(ledger, series=series)
    (number,) = complete(ledger, series, orders=[(replace(ORDER, priority=priority), DIGEST)])
    return number


def claim(ledger: Ledger, number: int, *, worker: str = "w1", now: float = 20.0):
    return ledger.jobs.claim(number, worker=worker, lease=LEASE, now=now)


def result(number: int = 1, kind: str = "seg") -> StoredResult:
    return StoredResult(f"2.25.{number}", "1.2.840.10008.5.1.4.1.1.66.4", "2.25.9", "1.2", "1.2.840.10008.1.2.1", kind,
                        f"results/{number}.dcm", "e" * 64, 10)  # fmt: skip


def names(ledger: Ledger, number: int) -> list[str]:
    return [event["name"] for event in ledger.history.events_of_job(number)]


def state(ledger: Ledger, number: int) -> State:
    return ledger.jobs.get(number).state


# -- arrivals ---------------------------------------------------------------------------------------------


def test_what_was_recorded_is_what_is_read(ledger):
    receive(ledger, announced=7)

    (series,) = ledger.arrivals.open_series()
    assert (series.received, series.announced, series.released, series.held_open) == (1, 7, True, False)
    assert ledger.arrivals.held(["1.2.3.1", "9.9"]) == {"1.2.3.1": Held("f" * 64, "p/1.2.3.1")}


def test_an_open_association_holds_the_series_and_its_end_lets_go(ledger):
    record(ledger, instance(), ASSOCIATION, node_id="node", now=1.0)
    assert ledger.arrivals.open_series()[0].held_open

    ledger.arrivals.associations_ended([AssociationEnd("a1", False, 5.0)])

    (series,) = ledger.arrivals.open_series()
    assert (series.held_open, series.released, series.last_activity) == (False, False, 5.0)


def test_two_associations_hold_until_the_second_has_ended(ledger):
    record(ledger, instance(1), ASSOCIATION, node_id="node", now=1.0)
    record(ledger, instance(2), replace(ASSOCIATION, association_id="a2"), node_id="node", now=2.0)

    ledger.arrivals.associations_ended([AssociationEnd("a1", True, 3.0)])

    assert ledger.arrivals.open_series()[0].held_open


def test_associations_that_end_together_end_each_in_its_own_way_and_the_rest_goes_on(ledger):
    for number in (1, 2, 3):
        association = replace(ASSOCIATION, association_id=f"a{number}")
        record(ledger, instance(1, f"1.2.{number}"), association, node_id="node", now=1.0)

    ledger.arrivals.associations_ended([AssociationEnd("a1", True, 5.0), AssociationEnd("a2", False, 7.0)])
    ledger.arrivals.associations_ended([])

    found = {
        series.series_instance_uid: (series.held_open, series.released, series.last_activity)
        for series in ledger.arrivals.open_series()
    }
    assert found == {"1.2.1": (False, True, 5.0), "1.2.2": (False, False, 7.0), "1.2.3": (True, False, 1.0)}


def test_a_restart_lets_go_of_what_died_with_the_node_and_starts_the_quiet_period(ledger):
    record(ledger, instance(), ASSOCIATION, node_id="node", now=1.0)
    record(ledger, instance(1, "1.2.4"), ASSOCIATION, node_id="other", now=1.0)

    ledger.arrivals.forget_associations_of("node", now=500.0)

    other, mine = sorted(ledger.arrivals.open_series(), key=lambda series: series.last_activity)
    assert (mine.held_open, mine.released, mine.last_activity) == (False, False, 500.0)
    assert other.held_open


def test_a_late_instance_raises_the_revision_once_however_many_follow(ledger):
    inference(ledger)

    receive(ledger, 2)
    receive(ledger, 3)

    assert ledger.arrivals.open_series()[0].revision == 2


def test_the_same_uid_twice_is_never_two_rows(ledger):
    receive(ledger)

    with pytest.raises(LedgerUnavailable):
        receive(ledger)

    assert ledger.arrivals.open_series()[0].received == 1
    assert len(ledger.arrivals.instances_of("1.2.3")) == 1


# -- completion -------------------------------------------------------------------------------------------


def test_a_complete_series_becomes_one_job_for_each_order_with_its_reason_on_record(ledger):
    receive(ledger)

    numbers = complete(ledger, orders=[(ORDER, DIGEST), (replace(ORDER, model="nodule"), DIGEST)])

    assert [ledger.jobs.get(number).model for number in numbers] == ["ct_lung", "nodule"]
    events = ledger.history.events_of("1.2.3")
    assert [event["name"] for event in events] == ["series.opened", "series.complete", "job.queued", "job.queued"]
    assert events[1]["fields"] == {"revision": 1, "reason": "test", "silent": 9.0}
    assert not ledger.arrivals.open_series()


def test_a_series_that_no_route_wants_says_so(ledger):
    receive(ledger)

    assert complete(ledger, orders=[]) == []

    assert ledger.history.events_of("1.2.3")[-1]["name"] == "series.unrouted"


def test_an_instance_that_comes_while_the_series_is_looked_at_undoes_the_decision(ledger):
    receive(ledger, now=1.0)
    (looked_at,) = ledger.arrivals.open_series()
    receive(ledger, 2, now=2.0)

    made = ledger.jobs.complete(
        "1.2.3", revision=1, last_activity=looked_at.last_activity, reason="", orders=[(ORDER, DIGEST)], now=3.0
    )

    assert made is None
    assert ledger.arrivals.open_series()


def test_an_association_that_comes_while_the_series_is_looked_at_undoes_the_decision(ledger):
    receive(ledger)
    late = replace(ASSOCIATION, association_id="late")
    ledger.arrivals.record([], [(instance().header, late)], node_id="node", now=2.0)

    assert complete(ledger) is None


def test_two_that_decide_the_same_make_one_job_and_one_event(ledger):
    receive(ledger)
    (found,) = ledger.arrivals.open_series()
    arguments = {"revision": 1, "last_activity": found.last_activity, "reason": "", "orders": [(ORDER, DIGEST)]}

    first = ledger.jobs.complete("1.2.3", **arguments, now=3.0)
    second = ledger.jobs.complete("1.2.3", **arguments, now=3.0)

    assert len(first) == 1
    assert second is None
    assert [e["name"] for e in ledger.history.events_of("1.2.3")].count("series.complete") == 1


def test_completion_and_a_new_instance_at_once_lose_neither(ledger):
    """Whoever is first: the instance belongs to the complete revision, or to the next one that is open."""
    for number in range(20):
        series = f"1.7.{number}"
        receive(ledger, 1, series)
        (found,) = [s for s in ledger.arrivals.open_series() if s.series_instance_uid == series]
        made = []

        def decide(series=series, found=found, made=made):
            made.append(
                ledger.jobs.complete(
                    series, revision=1, last_activity=found.last_activity, reason="", orders=[(ORDER, DIGEST)], now=3.0
                )
            )

        together(decide, lambda series=series: receive(ledger, 2, series, now=2.0))

        (after,) = [s for s in ledger.arrivals.open_series() if s.series_instance_uid == series]
        assert after.received == 2
        assert after.revision == (2 if made[0] else 1)


# -- claims -----------------------------------------------------------------------------------------------


def together(*actions) -> None:
    failures = []

    def run(action):
        try:
            barrier.wait()
            action()
        except Exception as error:
            failures.append(error)

    barrier = threading.Barrier(len(actions))
    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_many_workers_over_many_jobs_are_one_claim_each(ledger):
    numbers = [inference(ledger, f"1.3.{n}") for n in range(30)]
    claimed = Counter()

    def work(worker):
        for number in numbers:
            if claim(ledger, number, worker=worker):
                claimed[number] += 1

    together(*[lambda worker=f"w{n}": work(worker) for n in range(6)])

    assert claimed == Counter(numbers)
    assert all(names(ledger, number) == ["job.queued", "job.claimed"] for number in numbers)


def test_a_job_that_is_claimed_is_not_claimed_again(ledger):
    number = inference(ledger)

    assert claim(ledger, number).attempts == 1
    assert claim(ledger, number, worker="w2") is None


def test_a_job_is_not_claimed_before_its_time_nor_one_that_does_not_exist(ledger):
    number = inference(ledger)
    held = claim(ledger, number)
    ledger.jobs.ended(held, Happening.POSTPONED, now=21.0, reason="r", not_before=100.0)

    assert claim(ledger, number, now=99.0) is None
    assert claim(ledger, 4711) is None
    assert claim(ledger, number, now=100.0).attempts == 2


def test_a_lease_is_renewed_by_its_holder_only(ledger):
    held = claim(ledger, inference(ledger))

    ledger.jobs.renew(held, lease=LEASE, progress=0.5, now=50.0)

    assert ledger.jobs.get(held.job_id).progress == 0.5
    with pytest.raises(LostLease):
        ledger.jobs.renew(replace(held, lease_token="forged"), lease=LEASE, progress=0.6, now=50.0)


def test_a_worker_whose_lease_ran_out_is_fenced_off(ledger):
    late = claim(ledger, inference(ledger))

    assert ledger.jobs.recover(maximum_deaths=3, now=81.0) == 1
    current = claim(ledger, late.job_id, worker="w2", now=82.0)

    for attempt in (
        lambda: ledger.jobs.renew(late, lease=LEASE, progress=1.0, now=83.0),
        lambda: ledger.jobs.ended(late, Happening.REFUSED, now=83.0, reason="r"),
        lambda: ledger.jobs.inferred(late, [result()], now=83.0, seconds={}),
    ):
        with pytest.raises(LostLease):
            attempt()
    assert state(ledger, late.job_id) is State.RUNNING
    assert not ledger.jobs.results_of(late.job_id)
    assert current.attempts == 2


def test_a_lease_that_still_runs_is_not_recovered(ledger):
    claim(ledger, inference(ledger), now=20.0)

    assert ledger.jobs.recover(maximum_deaths=3, now=79.0) == 0


def test_a_job_that_kills_its_workers_fails_after_so_many_attempts_with_the_reason(ledger):
    number = inference(ledger)

    for attempt in range(3):
        claim(ledger, number, now=100.0 * (attempt + 1))
        ledger.jobs.recover(maximum_deaths=3, now=100.0 * (attempt + 1) + 61)

    failed = ledger.jobs.get(number)
    assert (failed.state, failed.reason, failed.detail) == (State.FAILED, "worker_died", "its worker died 3 times")
    assert names(ledger, number)[1:] == ["job.claimed", "job.abandoned"] * 2 + ["job.claimed", "job.exhausted"]


def test_a_job_that_kills_its_workers_makes_room_for_others_between_its_tries(ledger):
    number = inference(ledger)
    moments = []

    for attempt in range(5):
        claim(ledger, number, now=1000.0 * (attempt + 1))
        ledger.jobs.recover(maximum_deaths=10, now=1000.0 * (attempt + 1) + 61)
        moments.append(ledger.jobs.get(number).not_before - 1000.0 * (attempt + 1) - 61)

    assert moments == [0.0, 0.0, 2.0, 4.0, 8.0]


def test_deaths_before_the_operator_asked_again_do_not_count(ledger):
    number = inference(ledger)
    for attempt in range(3):
        claim(ledger, number, now=100.0 * (attempt + 1))
        ledger.jobs.recover(maximum_deaths=3, now=100.0 * (attempt + 1) + 61)
    assert state(ledger, number) is State.FAILED

    ledger.jobs.requeue(number, now=1000.0)
    claim(ledger, number, now=1001.0)
    ledger.jobs.recover(maximum_deaths=3, now=1100.0)

    assert state(ledger, number) is State.QUEUED


def test_a_worker_known_to_be_dead_gives_its_jobs_back_at_once_and_nobody_elses(ledger):
    mine, other, neighbour = (inference(ledger, f"1.3.{number}") for number in (1, 2, 3))
    claim(ledger, neighbour, worker="host:NODE:104#infer:123")
    assert ledger.jobs.abandon_worker("host:NODE:104#infer:12", maximum_deaths=3, now=21.0) == 0
    ledger.jobs.yielded(ledger.jobs.get(neighbour), reason="test", now=21.0, interrupted=False)
    claim(ledger, mine, worker="host:NODE:104#infer:12")
    claim(ledger, other, worker="host:NODE:1045#infer:12")

    assert ledger.jobs.abandon_worker("host:NODE:104#", maximum_deaths=3, now=21.0) == 1

    assert state(ledger, mine) is State.QUEUED
    assert state(ledger, other) is State.RUNNING


# -- due --------------------------------------------------------------------------------------------------


def due(ledger, kind=Kind.INFER, now=20.0, limit=10):
    return ledger.queue.due(kind, courtesy=COURTESY, now=now, hint_again=10.0, limit=limit)


def test_a_queued_job_is_due_until_a_message_speaks_for_it_and_again_when_that_grows_old(ledger):
    number = inference(ledger)

    assert due(ledger) == [number]
    ledger.queue.hinted([number], now=20.0)
    assert due(ledger, now=30.0) == []
    assert due(ledger, now=30.1) == [number]


def test_a_postponed_job_is_due_at_its_time_though_a_message_went_out_before(ledger):
    number = inference(ledger)
    ledger.queue.hinted([number], now=20.0)
    ledger.jobs.ended(claim(ledger, number), Happening.POSTPONED, now=21.0, reason="r", not_before=22.0)

    assert due(ledger, now=21.9) == []
    assert due(ledger, now=22.0) == [number]


def test_a_long_line_of_inferences_does_not_hide_a_delivery(ledger):
    held = claim(ledger, inference(ledger))
    deliveries = ledger.jobs.inferred(held, [result()], now=30.0, seconds={})
    for number in range(40):
        inference(ledger, f"1.4.{number}")

    assert due(ledger, Kind.DELIVER, now=31.0, limit=5) == deliveries


def test_the_most_urgent_is_due_first_and_a_delivery_is_as_urgent_as_its_inference(ledger):
    made = {priority: prioritised(ledger, priority) for priority in reversed(Priority)}
    held = claim(ledger, made[Priority.URGENT])
    ledger.jobs.inferred(held, [result()], now=21.0, seconds={})

    assert due(ledger) == [made[Priority.NORMAL], made[Priority.BACKGROUND]]
    assert {ledger.jobs.get(number).priority for number in due(ledger, Kind.DELIVER, now=22.0)} == {Priority.URGENT}


def test_only_what_is_more_urgent_overtakes(ledger):
    background, normal = prioritised(ledger, Priority.BACKGROUND), prioritised(ledger, Priority.NORMAL)

    def ahead_of(number, now=20.0):
        return ledger.queue.ahead_of(number, courtesy=COURTESY, now=now)

    assert ahead_of(background) == normal
    assert ahead_of(normal) is None
    assert ahead_of(4711) is None
    assert ahead_of(background, now=10.0 + COURTESY.seconds + 1) is None  # it has given way for long enough


def test_a_job_is_left_to_free_workers_before_a_busy_one_looks_at_it(ledger):
    number = prioritised(ledger, Priority.URGENT)
    ledger.queue.hinted([number], now=20.0)

    def waiting(since):
        return ledger.queue.waiting(Kind.INFER, courtesy=COURTESY, since=since, now=30.0)

    assert waiting(since=19.9) is None
    assert waiting(since=20.0) == (number, Priority.URGENT, 0, 0)
    claim(ledger, number)
    assert waiting(since=20.0) is None


def test_a_job_that_gives_way_keeps_its_place_and_its_attempts_and_is_fenced(ledger):
    number = inference(ledger)
    held = claim(ledger, number)

    ledger.jobs.yielded(held, reason="more_urgent", now=25.0, interrupted=True)

    after = ledger.jobs.get(number)
    assert (after.state, after.attempts, after.yielded, after.not_before) == (State.QUEUED, 0, 1, held.not_before)
    assert names(ledger, number)[-1] == "job.yielded"
    with pytest.raises(LostLease):
        ledger.jobs.yielded(held, reason="more_urgent", now=26.0, interrupted=True)
    ledger.jobs.yielded(claim(ledger, number), reason="worker_stops", now=27.0, interrupted=False)
    assert ledger.jobs.get(number).yielded == 1


# -- ended ------------------------------------------------------------------------------------------------


def test_results_deliveries_and_done_are_one_fact(ledger):
    held = claim(ledger, inference(ledger))

    deliveries = ledger.jobs.inferred(held, [result(2, "sr"), result(1, "seg")], now=30.0, seconds={"model": 1.5})

    assert state(ledger, held.job_id) is State.DONE
    assert [made.kind for made in ledger.jobs.results_of(held.job_id)] == ["seg", "sr"]
    assert [ledger.jobs.get(number).peer for number in deliveries] == ["PACS", "ARCHIVE"]
    assert all(ledger.jobs.get(number).parent_id == held.job_id for number in deliveries)
    assert names(ledger, held.job_id) == ["job.queued", "job.claimed", "job.finished"]
    assert names(ledger, deliveries[0]) == ["job.queued"]


def test_results_of_a_revision_that_has_passed_are_not_recorded(ledger):
    held = claim(ledger, inference(ledger))
    receive(ledger, 2, now=25.0)

    assert ledger.jobs.inferred(held, [result()], now=30.0, seconds={}) == []

    assert state(ledger, held.job_id) is State.CANCELLED
    assert not ledger.jobs.results_of(held.job_id)
    assert ledger.history.events_of_job(held.job_id)[-1]["fields"]["detail"] == "by revision 2"


def test_a_later_revision_cancels_what_is_left_of_the_earlier_and_lets_the_running_finish(ledger):
    held = claim(ledger, inference(ledger))
    to_pacs, to_archive = ledger.jobs.inferred(held, [result()], now=30.0, seconds={})
    claim(ledger, to_archive, now=31.0)
    receive(ledger, 2, now=32.0)

    (second,) = complete(ledger, now=33.0)

    assert state(ledger, held.job_id) is State.DONE
    assert state(ledger, to_pacs) is State.CANCELLED
    assert state(ledger, to_archive) is State.RUNNING
    assert ledger.jobs.get(second).revision == 2
    assert [r.sop_instance_uid for r in ledger.jobs.earlier_results("1.2.3", "ct_lung", before_revision=2)] == [
        "2.25.1"
    ]
    assert not ledger.jobs.earlier_results("1.2.3", "other", before_revision=2)


def test_a_job_of_a_passed_revision_is_cancelled_when_it_is_claimed(ledger):
    number = inference(ledger)
    receive(ledger, 2, now=15.0)

    assert claim(ledger, number) is None

    assert state(ledger, number) is State.CANCELLED
    assert names(ledger, number)[-1] == "job.superseded"


def test_completion_and_claims_at_once_do_not_deadlock(ledger):
    for number in range(15):
        series = f"1.8.{number}"
        first = inference(ledger, series)
        receive(ledger, 2, series, now=15.0)

        together(lambda series=series: complete(ledger, series), lambda first=first: claim(ledger, first))

        assert state(ledger, first) is State.CANCELLED
        assert names(ledger, first).count("job.superseded") == 1


def test_every_way_to_end_leaves_its_reason_and_one_event(ledger):
    ends = {
        Happening.DECLINED: State.NOT_APPLICABLE,
        Happening.REFUSED: State.FAILED,
        Happening.EXHAUSTED: State.FAILED,
        Happening.POSTPONED: State.QUEUED,
    }
    for place, (happening, after) in enumerate(ends.items()):
        held = claim(ledger, inference(ledger, f"1.5.{place}"))

        ledger.jobs.ended(held, happening, now=30.0, reason="why", detail="more", not_before=40.0)

        ended = ledger.jobs.get(held.job_id)
        assert (ended.state, ended.reason, ended.detail) == (after, "why", "more")
        assert names(ledger, held.job_id) == ["job.queued", "job.claimed", f"job.{happening}"]
        assert ended.lease_token is None


def test_what_the_table_does_not_allow_is_not_done(ledger):
    held = claim(ledger, inference(ledger))
    ledger.jobs.ended(held, Happening.REFUSED, now=30.0, reason="why")

    with pytest.raises(LostLease):
        ledger.jobs.ended(held, Happening.FINISHED, now=31.0)
    with pytest.raises(IllegalTransition):
        ledger.jobs.ended(claim(ledger, inference(ledger, "1.9")), Happening.CLAIMED, now=30.0)


# -- several series -----------------------------------------------------------------------------------------


def test_a_job_that_lacked_a_series_of_its_study_is_queued_again_when_one_comes(ledger):
    waiting, other = inference(ledger, "1.2.3"), inference(ledger, "1.2.4")
    for number, reason in ((waiting, "missing_input"), (other, "organ_not_found")):
        ledger.jobs.ended(claim(ledger, number), Happening.DECLINED, now=21.0, reason=reason)

    inference(ledger, "1.2.5")

    assert ledger.jobs.get(waiting).state is State.QUEUED
    assert ledger.jobs.get(other).state is State.NOT_APPLICABLE
    assert ledger.arrivals.complete_series_of("1.2") == ["1.2.3", "1.2.4", "1.2.5"]


def test_only_complete_series_of_others_are_offered(ledger):
    inference(ledger, "1.2.3")
    receive(ledger, 1, "1.2.4")
    receive(ledger, 1, "1.2.6", is_own_result=True)

    assert ledger.arrivals.complete_series_of("1.2") == ["1.2.3"]


# -- requeued ---------------------------------------------------------------------------------------------


def test_a_failed_inference_is_requeued_with_all_its_attempts(ledger):
    held = claim(ledger, inference(ledger))
    ledger.jobs.ended(held, Happening.REFUSED, now=30.0, reason="why")

    again = ledger.jobs.requeue(held.job_id, now=40.0)

    assert (again.state, again.attempts, again.not_before, again.wanted_since) == (State.QUEUED, 0, 40.0, 40.0)
    assert due(ledger, now=40.0) == [held.job_id]
    assert names(ledger, held.job_id)[-1] == "job.requeued"


def test_an_inference_that_is_done_or_at_work_is_not_requeued(ledger):
    held = claim(ledger, inference(ledger))
    with pytest.raises(IllegalTransition, match="is running"):
        ledger.jobs.requeue(held.job_id, now=30.0)

    ledger.jobs.inferred(held, [result()], now=30.0, seconds={})

    with pytest.raises(IllegalTransition, match="is done"):
        ledger.jobs.requeue(held.job_id, now=40.0)


def deliveries_of(ledger: Ledger, number: int) -> list[tuple[int, int]]:
    """Make inferences that have results; return, of each, the deliveries to PACS and to ARCHIVE."""
    made = []
    for at in range(number):
        held = claim(ledger, inference(ledger, f"1.12.{at}"))
        to_pacs, to_archive = ledger.jobs.inferred(held, [result(at)], now=30.0, seconds={})
        made.append((to_pacs, to_archive))
    return made


def fails(ledger: Ledger, number: int, *, now: float, until: float, reason: str = "peer_unreachable") -> None:
    held = claim(ledger, number, now=now)
    ledger.jobs.ended(held, Happening.POSTPONED, now=now, reason=reason, not_before=until)


def test_what_one_delivery_learns_of_a_peer_that_is_away_holds_for_all_to_it_and_for_no_other(ledger):
    (first, _), (second, other), (third, _) = deliveries_of(ledger, 3)

    fails(ledger, second, now=31.0, until=500.0)

    assert [ledger.jobs.get(number).not_before for number in (first, second, third)] == [500.0] * 3
    assert [ledger.jobs.get(number).reason for number in (first, third)] == ["peer_unreachable"] * 2
    assert ledger.jobs.get(other).not_before == 30.0
    assert ledger.jobs.get(other).reason is None


def test_a_peer_that_is_back_gets_at_once_whatever_waited_for_that(ledger):
    (first, _), (second, _), (third, _) = deliveries_of(ledger, 3)
    fails(ledger, third, now=31.0, until=900.0, reason="peer_busy")  # its own affair
    fails(ledger, first, now=32.0, until=500.0)

    ledger.jobs.withdraw(first, now=33.0)
    ledger.jobs.requeue(first, now=40.0)  # an operator knows that it is back
    assert second not in due(ledger, Kind.DELIVER, now=40.0, limit=9)

    ledger.jobs.ended(claim(ledger, first, now=40.0), Happening.FINISHED, now=41.0)

    assert second in due(ledger, Kind.DELIVER, now=41.0, limit=9)
    assert ledger.jobs.get(second).reason is None
    assert ledger.jobs.get(third).not_before == 900.0


def test_a_status_that_means_later_holds_no_other_delivery_back(ledger):
    (first, _), (second, _) = deliveries_of(ledger, 2)
    fails(ledger, first, now=31.0, until=500.0, reason="peer_busy")
    assert ledger.jobs.get(second).not_before == 30.0


def test_pauses_grow_with_the_tries_at_a_peer_whichever_delivery_made_them(ledger):
    (first, other), (second, _) = deliveries_of(ledger, 2)
    for at in (31.0, 41.0, 51.0):
        fails(ledger, first, now=at, until=at + 5.0)
    held = claim(ledger, second, now=60.0)
    assert (held.attempts, ledger.jobs.tries(held)) == (1, 3)
    assert ledger.jobs.tries(claim(ledger, other, now=60.0)) == 1


def test_a_delivery_that_is_done_is_sent_once_more(ledger):
    held = claim(ledger, inference(ledger))
    delivery, _ = ledger.jobs.inferred(held, [result()], now=30.0, seconds={})
    ledger.jobs.ended(claim(ledger, delivery, now=31.0), Happening.FINISHED, now=32.0)

    ledger.jobs.requeue(delivery, now=40.0)

    assert claim(ledger, delivery, now=41.0) is not None


def test_a_job_that_is_not_wanted_any_more_is_cancelled_and_its_worker_notices(ledger):
    number = inference(ledger)
    held = claim(ledger, number)

    cancelled = ledger.jobs.withdraw(number, now=30.0)

    assert cancelled.state is State.CANCELLED
    assert names(ledger, number)[-1] == "job.withdrawn"
    with pytest.raises(LostLease):
        ledger.jobs.renew(held, lease=60.0, progress=0.5, now=31.0)
    with pytest.raises(IllegalTransition, match="cancelled"):
        ledger.jobs.withdraw(number, now=32.0)
    assert ledger.jobs.requeue(number, now=33.0).state is State.QUEUED


def test_a_job_that_does_not_exist_is_not_requeued(ledger):
    with pytest.raises(IllegalTransition, match="no job 4711"):
        ledger.jobs.requeue(4711, now=1.0)


# -- asked ------------------------------------------------------------------------------------------------


def test_the_counts_add_up(ledger):
    held = claim(ledger, inference(ledger))
    ledger.jobs.inferred(held, [result()], now=30.0, seconds={})
    inference(ledger, "1.6")

    assert ledger.history.counts() == {
        "instances": 2,
        "bytes": 2000,
        "series": 2,
        "jobs": {"infer": {"done": 1, "queued": 1}, "deliver": {"queued": 2}},
    }


def test_a_study_tells_its_whole_story(ledger):
    held = claim(ledger, inference(ledger))
    ledger.jobs.inferred(held, [result()], now=30.0, seconds={})

    assert [event["name"] for event in ledger.history.events_of("1.2")] == [
        "series.opened",
        "series.complete",
        "job.queued",
        "job.claimed",
        "job.finished",
        "job.queued",
        "job.queued",
    ]
    assert len(ledger.history.jobs_of("1.2")) == 3
    assert ledger.history.results_of("1.2.3")[0]["revision"] == 1
    assert ledger.history.series_of("1.2")[0]["series_instance_uid"] == "1.2.3"
    assert [e["event_id"] for e in ledger.history.events_after(ledger.history.latest_event_id())] == []


def test_what_is_left_to_do_is_listed_before_what_has_ended(ledger):
    held = claim(ledger, inference(ledger))
    ledger.jobs.ended(held, Happening.REFUSED, now=30.0, reason="why")
    waiting = inference(ledger, "1.6")

    assert [row["job_id"] for row in ledger.history.recent_jobs(limit=5)] == [waiting, held.job_id]


def test_a_late_object_that_is_no_image_does_not_run_the_models_on_the_same_images_again(ledger):
    receive(ledger, 1)
    complete(ledger)

    receive(ledger, 2, sop_class_uid="1.2.840.10008.5.1.4.1.1.88.67", now=30.0)

    assert ledger.arrivals.open_series() == []
    assert len(ledger.arrivals.instances_of("1.2.3")) == 2
