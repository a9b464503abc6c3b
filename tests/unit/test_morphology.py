"""Balls on voxels are what distances say they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from workers.algorithms.morphology import ball_close, ball_dilate, ball_erode, unpooled

SPACINGS = [(5.0, 1.7, 1.7), (1.0, 1.0, 1.0), (8.0, 2.6, 2.2)]
RADII = [0.4, 1.0, 2.4, 3.0, 8.0]


def masks():
    random = np.random.default_rng(0)
    yield np.zeros((5, 6, 7), bool)
    yield np.ones((5, 6, 7), bool)
    for share in (0.02, 0.5, 0.98):
        yield random.random((9, 23, 19)) < share
    blob = np.zeros((12, 30, 28), bool)
    blob[3:9, 5:22, 8:15] = True
    blob[5:7, 10:14, 10:13] = False
    yield blob
    yield random.random((1, 40, 3)) < 0.3


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("radius", RADII)
def test_a_mask_grows_to_all_that_is_near_enough_and_shrinks_by_what_is_near_its_outside(radius, spacing):
    for mask in masks():
        grown = ndimage.distance_transform_edt(~mask, spacing) <= radius if mask.any() else mask
        left = ndimage.distance_transform_edt(mask, spacing) > radius if not mask.all() else mask

        assert np.array_equal(ball_dilate(mask, radius, spacing), grown)
        assert np.array_equal(ball_erode(mask, radius, spacing), left)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("radius", RADII)
def test_closing_grows_and_shrinks_as_if_there_were_no_border(radius, spacing):
    for mask in masks():
        padded = np.pad(mask, 25)
        grown = ball_dilate(padded, radius, spacing)
        closed = ball_erode(grown, radius, spacing)[25:-25, 25:-25, 25:-25]

        assert np.array_equal(ball_close(mask, radius, spacing), closed)


FACTORS = [(1, 2, 2), (2, 3, 3), (1, 6, 6), (3, 5, 4)]


@pytest.mark.parametrize("factor", FACTORS)
def test_a_coarse_mask_is_as_fine_in_its_box_as_it_would_be_in_all_of_the_volume(factor):
    for mask in masks():
        size = [length * step for length, step in zip(mask.shape, factor, strict=True)]
        whole = torch.from_numpy(np.pad(mask, 8, mode="edge").astype(np.float32))[None, None]
        fine = torch.nn.functional.interpolate(whole, scale_factor=factor, mode="trilinear")[0, 0].numpy()
        inner = tuple(slice(8 * step, 8 * step + length) for step, length in zip(factor, size, strict=True))
        short = tuple(length - step // 2 for length, step in zip(size, factor, strict=True))

        assert np.array_equal(unpooled(mask, factor, tuple(size)), fine[inner] > 0.5001)
        assert np.array_equal(
            unpooled(mask, factor, short), unpooled(mask, factor, tuple(size))[tuple(map(slice, short))]
        )


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirrored_coarse_mask_is_mirrored_when_it_is_fine(factor, axis):
    for mask in masks():
        size = tuple(length * step for length, step in zip(mask.shape, factor, strict=True))

        assert np.array_equal(unpooled(np.flip(mask, axis), factor, size), np.flip(unpooled(mask, factor, size), axis))
