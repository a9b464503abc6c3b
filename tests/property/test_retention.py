"""Whatever the operator sets and however full the disk: nothing goes that somebody waits for or counts on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.lifecycle import Kind, State
from dicom_node.retention import DAY, SETTLED, Ground, Objection, Policy, Study, Work, departures, judge

NOW = 1_000_000_000.0
FINISHED = Study("1.2", NOW - 40 * DAY, is_complete=True, is_held=False, work=(Work(Kind.DELIVER, State.DONE, 3, 3),))

days = st.one_of(st.just(0.0), st.floats(0.01, 1000))
policies = st.builds(Policy, days, days, st.booleans())
works = st.builds(Work, st.sampled_from(Kind), st.sampled_from(State), st.integers(0, 3), st.integers(0, 3))
moments = st.floats(NOW - 2000 * DAY, NOW + DAY)
studies = st.builds(
    Study,
    st.text("0123456789.", min_size=1, max_size=4),
    moments,
    st.booleans(),
    st.booleans(),
    st.lists(works, max_size=3),
    st.one_of(st.none(), moments),
)


@given(st.lists(studies, max_size=8), policies, st.booleans())
def test_nothing_goes_that_is_arriving_undelivered_uncommitted_failed_or_promised(some, policy, is_low):
    for study, ground in departures(some, policy, is_low=is_low, now=NOW):
        assert study.is_complete
        assert not study.is_held
        assert study.last_activity <= NOW - SETTLED
        assert {work.state for work in study.work} <= {State.DONE, State.NOT_APPLICABLE, State.CANCELLED}
        for work in study.work:
            if (work.kind, work.state) == (Kind.DELIVER, State.DONE):
                assert work.committed >= work.asked
                assert work.asked or not policy.only_committed
        if study.promised_at is not None:
            assert policy.promise_days > 0
            assert NOW - study.promised_at >= policy.promise_days * DAY
        if ground is Ground.AGE:
            assert 0 < policy.days <= (NOW - study.last_activity) / DAY
        else:
            assert is_low


@given(st.lists(studies, max_size=8), st.booleans())
def test_without_settings_and_with_room_nothing_goes(some, only_committed):
    assert departures(some, Policy(0.0, 0.0, only_committed), is_low=False, now=NOW) == []


@given(st.lists(studies, max_size=8), policies, st.booleans())
def test_the_one_without_activity_for_longest_goes_first_and_none_that_may_go_is_left_out(some, policy, is_low):
    going = departures(some, policy, is_low=is_low, now=NOW)

    assert [study.last_activity for study, _ in going] == sorted(study.last_activity for study, _ in going)
    may = [study for study in some if isinstance(judge(study, policy, is_low=is_low, now=NOW), Ground)]
    assert len(going) == len(may)


@pytest.mark.parametrize(
    ("changes", "policy", "verdict"),
    [
        ({}, Policy(30), Ground.AGE),
        ({}, Policy(41), Objection.YOUNG),
        ({"is_complete": False}, Policy(30), Objection.ARRIVING),
        ({"is_held": True}, Policy(30), Objection.ARRIVING),
        ({"work": ()}, Policy(30), Ground.AGE),
        ({"work": (Work(Kind.INFER, State.FAILED),)}, Policy(30), Objection.UNFINISHED),
        ({"work": (Work(Kind.INFER, State.CANCELLED),)}, Policy(30), Ground.AGE),
        ({"work": (Work(Kind.DELIVER, State.COMMITTING, 3, 2),)}, Policy(30), Objection.UNFINISHED),
        ({"work": (Work(Kind.DELIVER, State.DONE, 3, 2),)}, Policy(30), Objection.UNCOMMITTED),
        ({"work": (Work(Kind.DELIVER, State.DONE, 0, 0),)}, Policy(30), Ground.AGE),
        ({"work": (Work(Kind.DELIVER, State.DONE, 0, 0),)}, Policy(30, only_committed=True), Objection.UNCOMMITTED),
        ({"promised_at": NOW - 39 * DAY}, Policy(30), Objection.PROMISED),
        ({"promised_at": NOW - 39 * DAY}, Policy(30, promise_days=40), Objection.PROMISED),
        ({"promised_at": NOW - 39 * DAY}, Policy(30, promise_days=38), Ground.AGE),
    ],
)
def test_what_a_study_is_told(changes, policy, verdict):
    assert judge(replace(FINISHED, **changes), policy, is_low=False, now=NOW) is verdict


def test_a_full_disk_lets_a_finished_study_go_before_its_time_but_not_in_its_first_hour():
    young = replace(FINISHED, last_activity=NOW - SETTLED)

    assert judge(young, Policy(), is_low=True, now=NOW) is Ground.FREE_SPACE
    assert judge(replace(young, last_activity=NOW - SETTLED + 1), Policy(), is_low=True, now=NOW) is Objection.ARRIVING
