"""Which slices belong together: phases, echoes, b-values, interleaved scans; and what numbers every image."""

from __future__ import annotations

import numpy as np
import pytest

from workers.slices import TRAITS, Slice
from workers.stacks import best_stack

_NUMBER = {name: number for number, (name, _) in enumerate(TRAITS)}


def piece(along: float, number: int, **traits: str) -> Slice:
    said = [""] * len(TRAITS)
    for name, value in traits.items():
        said[_NUMBER[name]] = value
    return Slice(
        instance=number,
        frame_number=1,
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        position=np.array([0.0, 0.0, along]),
        spacing=(1.0, 1.0),
        thickness=3.0,
        shape=(16, 16),
        slope=1.0,
        intercept=0.0,
        fits_int16=True,
        rank=(0, number),
        block=("1.2.3", -1),
        traits=tuple(said),
    )


def said(stack, name):
    return {one.traits[_NUMBER[name]] for one in stack.slices}


def test_echoes_of_the_same_places_are_never_mixed():
    slices = [piece(3.0 * n, 2 * n + e, EchoTime=time) for n in range(10) for e, time in enumerate(("4.6", "2.3"))]

    stack = best_stack(slices)

    assert said(stack, "EchoTime") == {"4.6"}, "the one acquired first"
    assert len(stack.slices) == 10
    assert stack.left_out == ("10 images of another acquisition (EchoTime) left out",)


def test_the_stack_that_suits_is_taken_however_few_slices_it_has():
    slices = [piece(3.0 * n, n, DiffusionBValue="0") for n in range(8)]
    slices += [piece(3.0 * n, 100 + n, DiffusionBValue="1000") for n in range(12)]

    most = best_stack(slices)
    wanted = best_stack(slices, lambda one: one.traits[_NUMBER["DiffusionBValue"]] == "0")

    assert said(most, "DiffusionBValue") == {"1000"}
    assert said(wanted, "DiffusionBValue") == {"0"}
    assert len(wanted.slices) == 8


def test_phases_of_different_lengths_are_told_apart():
    slices = [piece(2.0 * n, n, AcquisitionNumber="2") for n in range(30)]
    slices += [piece(2.0 * n, 100 + n, AcquisitionNumber="3") for n in range(80)]

    stack = best_stack(slices)

    assert said(stack, "AcquisitionNumber") == {"3"}
    assert len(stack.slices) == 80


def test_what_numbers_every_image_tells_nothing_apart():
    """Each image has a time and an acquisition number of its own, as single axial scans have."""
    slices = [piece(5.0 * n, n, AcquisitionNumber=str(n), AcquisitionTime=str(101500 + n)) for n in range(20)]

    stack = best_stack(slices)

    assert len(stack.slices) == 20
    assert stack.left_out == ()


def test_repeated_places_that_only_a_number_tells_apart_stay_one_stack():
    slices = [piece(5.0 * (n % 10), n, AcquisitionTime=str(n)) for n in range(20)]

    stack = best_stack(slices)

    assert len(stack.slices) == 10
    assert [one.instance for one in stack.slices] == list(range(10))


def test_a_scan_in_two_runs_one_after_the_other_is_one_stack():
    slices = [piece(5.0 * n, n, AcquisitionNumber="1" if n < 12 else "2") for n in range(24)]
    slices = [*slices[:12], *[piece(5.0 * n + 1.5, n, AcquisitionNumber="2") for n in range(12, 24)]]

    assert len(best_stack(slices).slices) == 24


def test_an_interleaved_scan_of_even_gaps_is_one_stack():
    slices = [piece(5.0 * n, n, AcquisitionNumber="1" if n % 2 else "2") for n in range(24)]

    assert len(best_stack(slices).slices) == 24


def test_two_scans_of_one_region_off_by_part_of_a_gap_are_two():
    slices = [piece(5.0 * n, n, AcquisitionNumber="1") for n in range(12)]
    slices += [piece(5.0 * n + 1.2, 100 + n, AcquisitionNumber="2") for n in range(12)]

    stack = best_stack(slices)

    assert said(stack, "AcquisitionNumber") == {"1"}
    assert len(stack.slices) == 12


def test_magnitude_and_phase_of_two_echoes_are_four_stacks():
    kinds = [("ORIGINAL\\M", "2.3"), ("ORIGINAL\\P", "2.3"), ("ORIGINAL\\M", "4.6"), ("ORIGINAL\\P", "4.6")]
    slices = [
        piece(3.0 * n, 4 * n + e, ImageType=kind, EchoTime=echo)
        for n in range(9)
        for e, (kind, echo) in enumerate(kinds)
    ]

    stack = best_stack(slices, lambda one: one.traits[:2] == ("ORIGINAL\\P", "4.6"))

    assert said(stack, "ImageType") == {"ORIGINAL\\P"}
    assert said(stack, "EchoTime") == {"4.6"}
    assert len(stack.slices) == 9
    assert stack.left_out == ("27 images of another acquisition (ImageType, EchoTime) left out",)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_files_changes_nothing(seed):
    slices = [piece(3.0 * n, 2 * n + e, EchoTime=time) for n in range(10) for e, time in enumerate(("4.6", "2.3"))]
    shuffled = [slices[n] for n in np.random.default_rng(seed).permutation(len(slices))]

    assert [one.instance for one in best_stack(shuffled).slices] == [one.instance for one in best_stack(slices).slices]
