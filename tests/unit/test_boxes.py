"""Where labels are, as scipy says it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from workers.boxes import boxes_of


def by_scipy(labels):
    return {value: box for value, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None}


@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        arrays.array_shapes(min_dims=3, max_dims=3, max_side=7),
        elements=st.sampled_from([0, 0, 0, 1, 2, 7, 255]),
    )
)
def test_boxes_are_those_of_scipy(labels):
    assert boxes_of(labels) == by_scipy(labels)


def test_the_axes_are_not_mistaken_for_one_another():
    labels = np.zeros((5, 7, 11), np.uint8)
    labels[1:3, 2:6, 4] = 9

    assert boxes_of(labels) == {9: (slice(1, 3), slice(2, 6), slice(4, 5))}


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_an_array_may_lie_in_memory_in_any_order(order):
    labels = np.random.default_rng(0).choice(np.array([0, 0, 0, 3, 200], np.uint8), (6, 8, 9)).transpose(order)

    assert boxes_of(labels) == by_scipy(np.ascontiguousarray(labels))


def test_nothing_is_nowhere():
    assert boxes_of(np.zeros((3, 4, 5), np.uint8)) == {}
