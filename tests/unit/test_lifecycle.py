from __future__ import annotations

import random

import pytest

from dicom_node.lifecycle import (
    REQUEUEABLE,
    TRANSITIONS,
    Courtesy,
    Happening,
    IllegalTransition,
    Kind,
    State,
    advance,
    backoff,
)


def test_every_state_is_reached_and_every_happening_happens():
    reached = {State.QUEUED, *TRANSITIONS.values()}

    assert reached == set(State)
    assert {happening for _, happening in TRANSITIONS} == set(Happening)


def test_a_row_that_the_table_does_not_have_is_an_error_that_says_so():
    with pytest.raises(IllegalTransition, match="a job that is done cannot be claimed"):
        advance(State.DONE, Happening.CLAIMED)


@pytest.mark.parametrize(("before", "happening"), TRANSITIONS)
def test_the_table_is_what_advance_obeys(before, happening):
    assert advance(before, happening) is TRANSITIONS[before, happening]


def test_what_may_be_requeued_is_in_the_table_as_well():
    for kind in Kind:
        for state in REQUEUEABLE[kind]:
            assert advance(state, Happening.REQUEUED) is State.QUEUED


def test_an_inference_that_is_done_is_never_run_again():
    assert State.DONE not in REQUEUEABLE[Kind.INFER]
    assert State.DONE in REQUEUEABLE[Kind.DELIVER]


def test_the_pause_doubles_up_to_the_maximum_and_is_spread_by_half():
    jitter = random.Random(1)

    pauses = [[backoff(n, first=5.0, maximum=600.0, jitter=jitter) for _ in range(200)] for n in (1, 2, 3, 50, 10_000)]

    for pause, full in zip(pauses, (5.0, 10.0, 20.0, 600.0, 600.0), strict=True):
        assert full / 2 <= min(pause) < max(pause) <= full


def test_a_job_gives_way_so_often_and_so_long_and_then_no_more():
    courtesy = Courtesy(seconds=60.0, times=2)

    assert courtesy.gives_way(wanted_since=100.0, yielded=1, now=160.0)
    assert not courtesy.gives_way(wanted_since=100.0, yielded=2, now=110.0)
    assert not courtesy.gives_way(wanted_since=100.0, yielded=0, now=161.0)
