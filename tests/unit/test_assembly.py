from __future__ import annotations

from dataclasses import replace

import pytest

from dicom_node.assembly import Evidence, decide, leaves_no_gap
from dicom_node.entities import SlicePlace

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
TILTED = (1.0, 0.0, 0.0, 0.0, 0.9397, -0.3420)
NOTHING = Evidence(
    received=0, announced=None, whole=False, places=(), held_open=False, released=True, last_activity=100.0
)


def slices(*z: float, orientation=AXIAL) -> list[SlicePlace]:
    return [SlicePlace(orientation, (-100.0, -50.0, position)) for position in z]


def asked(evidence: Evidence, *, now: float):
    return decide(evidence, now=now, settle=2.0, quiet=20.0)


def test_an_announced_count_that_is_reached_needs_only_the_settle_time():
    evidence = replace(NOTHING, received=64, announced=64)

    assert not asked(evidence, now=101.9).complete
    assert asked(evidence, now=102.0).complete
    assert asked(evidence, now=102.0).reason == "64 of 64 announced, association released"


def test_an_open_association_holds_its_series_open_for_ever():
    evidence = replace(NOTHING, received=64, announced=64, held_open=True)

    assert not asked(evidence, now=1e9).complete


def test_a_count_that_is_not_reached_speaks_against_completeness_however_smooth_the_slices_lie():
    evidence = replace(NOTHING, received=4, announced=5, places=slices(0, 5, 10, 15))

    assert not asked(evidence, now=119.9).complete
    assert asked(evidence, now=120.0).reason == "4 received, association released, quiet for 20 s"


def test_a_count_that_is_exceeded_says_nothing():
    evidence = replace(NOTHING, received=4, announced=2, places=slices(0, 5, 10, 15))

    assert asked(evidence, now=102.0).reason == "4 slices without a gap, association released"


def test_slices_without_a_gap_need_only_the_settle_time():
    evidence = replace(NOTHING, received=3, places=slices(10, 0, 5))

    assert asked(evidence, now=102.0).complete


def test_without_a_release_the_best_evidence_waits_for_silence():
    evidence = replace(NOTHING, received=64, announced=64, released=False)

    assert not asked(evidence, now=119.0).complete
    assert "ended without release" in asked(evidence, now=120.0).reason


def test_what_is_complete_by_itself_needs_only_the_settle_time():
    evidence = replace(NOTHING, received=2, whole=True)

    assert asked(evidence, now=102.0).reason == "2 received, each complete by itself, association released"


def test_an_undecided_series_says_when_to_ask_again():
    evidence = replace(NOTHING, received=2)

    assert asked(evidence, now=101.0).ask_again == 120.0


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        pytest.param(slices(0, 5, 10), True, id="even"),
        pytest.param(slices(0, -5, -10), True, id="reversed"),
        pytest.param(slices(0, 5, 10, 20), False, id="one slice missing"),
        pytest.param(slices(0, 5), False, id="two slices prove nothing"),
        pytest.param(slices(0, 0, 0, 0), False, id="all at one place"),
        pytest.param(slices(0, 5.1, 10, 15.1, 20), True, id="rounded positions"),
        pytest.param(slices(0, 5, 10, 0, 5, 10), True, id="two phases"),
        pytest.param(slices(0, 5, 10, 0, 5), False, id="second phase cut off"),
        pytest.param(slices(0, 5, 10) + slices(15, orientation=TILTED), False, id="not parallel"),
        pytest.param(slices(0, 3, 6, 9, orientation=TILTED), True, id="tilted gantry"),
        pytest.param(slices(0, 5, 10, orientation=(0.0,) * 6), False, id="no orientation at all"),
        pytest.param([], False, id="nothing"),
    ],
)
def test_a_gap_is_a_step_that_differs_from_its_neighbours(places, expected):
    assert leaves_no_gap(places) is expected
