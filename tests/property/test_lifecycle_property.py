from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dicom_node.lifecycle import TRANSITIONS, Happening, IllegalTransition, State, advance

ENDED = {State.DONE, State.NOT_APPLICABLE, State.FAILED, State.CANCELLED}


@given(st.lists(st.sampled_from(Happening)))
def test_no_story_leaves_the_table(happenings):
    state = State.QUEUED

    for happening in happenings:
        try:
            after = advance(state, happening)
        except IllegalTransition:
            assert (state, happening) not in TRANSITIONS
            continue
        assert TRANSITIONS[state, happening] is after
        state = after


@given(st.lists(st.sampled_from(sorted(set(Happening) - {Happening.REQUEUED}))))
def test_nothing_but_the_operator_or_a_later_revision_moves_a_job_that_has_ended(happenings):
    state, ended = State.QUEUED, None

    for happening in happenings:
        try:
            state = advance(state, happening)
        except IllegalTransition:
            continue
        if ended is not None:
            assert (ended, state) == (State.FAILED, State.CANCELLED)
            assert happening in (Happening.SUPERSEDED, Happening.WITHDRAWN)
        ended = state if state in ENDED else None


@given(st.lists(st.sampled_from(Happening)))
def test_every_job_can_still_end(happenings):
    state = State.QUEUED
    for happening in happenings:
        state = TRANSITIONS.get((state, happening), state)

    reachable, frontier = {state}, [state]
    while frontier:
        here = frontier.pop()
        for (before, _), after in TRANSITIONS.items():
            if before is here and after not in reachable:
                reachable.add(after)
                frontier.append(after)

    assert reachable & ENDED
