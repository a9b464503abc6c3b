"""Lungs where anatomy is unkind: grown together along a sheet, behind a thin wall, one of them small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from dicom_node.demo.phantom import dice, make_thorax, write_series
from workers.algorithms import ct_lung
from workers.volume import load

CPU = torch.device("cpu")


def nothing(part: float) -> None:
    """A progress that nobody watches."""


@pytest.fixture(scope="module")
def thorax(tmp_path_factory):
    phantom = make_thorax(slices=34, spacing=(8.0, 2.6, 2.2), size=(124, 162), nodules=(), seed=3)
    volume = load(write_series(phantom, tmp_path_factory.mktemp("thorax")))
    lungs = phantom.right * np.uint8(ct_lung.RIGHT) + phantom.left * np.uint8(ct_lung.LEFT)
    assert np.array_equal(volume.to_source(volume.grid.values), phantom.hu)  # one order of slices for both
    return volume.grid, lungs


def test_lungs_that_touch_along_many_rows_are_cut_at_the_wall_between_them(thorax):
    """Both lungs reach the midline over 60 mm of depth and 80 mm of height, a blurred wall between them."""
    grid, lungs = thorax
    values, truth = grid.values.copy(), lungs.copy()
    middle = lungs.shape[2] // 2
    joined = 0
    for k in range(12, 22):
        both = (lungs[k] == ct_lung.RIGHT).any(axis=1) & (lungs[k] == ct_lung.LEFT).any(axis=1)
        for row in np.flatnonzero(both)[:23]:
            first = np.flatnonzero(lungs[k, row] == ct_lung.RIGHT)[-1]
            last = np.flatnonzero(lungs[k, row] == ct_lung.LEFT)[0]
            truth[k, row, first:middle], truth[k, row, middle + 1 : last] = ct_lung.RIGHT, ct_lung.LEFT
            values[k, row, first:last] = -850
            values[k, row, middle] = -600
            joined += 1

    labels = ct_lung.segment(replace(grid, values=values), CPU, nothing)

    assert joined > 150
    assert dice(labels == ct_lung.RIGHT, truth == ct_lung.RIGHT) > 0.95
    assert dice(labels == ct_lung.LEFT, truth == ct_lung.LEFT) > 0.95


def test_lungs_behind_a_thin_chest_wall_are_found(thorax):
    grid, lungs = thorax
    values = grid.values.copy()
    for k in np.flatnonzero(lungs.any(axis=(1, 2))):
        inside = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(lungs[k] > 0, 40), iterations=30))[
            40:-40, 40:-40
        ]
        values[k][ndimage.distance_transform_edt(~inside, grid.spacing[1:]) > 13.0] = -1000

    labels = ct_lung.segment(replace(grid, values=values), CPU, nothing)

    assert dice(labels > 0, lungs > 0) > 0.95


def test_a_small_left_lung_stays_left(thorax):
    grid, lungs = thorax
    left = lungs == ct_lung.LEFT
    planes = np.flatnonzero(left.any(axis=(1, 2)))
    gone = left & (np.arange(len(left)) < planes[int(0.6 * len(planes))])[:, None, None]
    values = np.where(gone, 40, grid.values).astype(np.int16)

    labels = ct_lung.segment(replace(grid, values=values), CPU, nothing)

    assert dice(labels == ct_lung.LEFT, left & ~gone) > 0.9
