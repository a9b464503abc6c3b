"""Onto the network's lattice and back: sides, places, numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dicom_node.demo.phantom import dice, make_thorax, write_series
from dicom_node.manifest import InputSlot, Intensity
from tests.conformance.cases import GEOMETRIES
from workers.preparing import prepare, scaled
from workers.volume import load

SMALL = {"slices": 24, "size": (60, 78), "spacing": (12.0, 5.4, 4.6), "noise": 0.0}
AXES = ["SPL", "RAS", "LPS", "LIA", "PIR"]


@pytest.fixture(scope="module", params=sorted(GEOMETRIES))
def grid(request, tmp_path_factory):
    phantom = make_thorax(**{**SMALL, **GEOMETRIES[request.param]}, seed=5)
    return load(write_series(phantom, tmp_path_factory.mktemp(request.param))).grid


def slot(**changes) -> InputSlot:
    return InputSlot(modality=("CT",), **changes)


def dark(values):
    """A network that marks what is as dark as lung."""
    return ((values > -950) & (values < -500)).astype(np.uint8)


def field(grid):
    """For each voxel of a grid its place in the grid's own directions, mm: shape `(3, k, j, i)`."""
    made = np.empty((3, *grid.shape))
    for axis in range(3):
        index = np.arange(grid.shape[axis]) * grid.spacing[axis]
        shape = [1, 1, 1]
        if axis != grid.stack:
            shape[axis] = -1
            made[axis] = index.reshape(shape)
        else:
            made[axis] = 0.0
        planes = [1, 1, 1]
        planes[grid.stack] = -1
        made[axis] = made[axis] + (grid.origins @ grid.directions[axis]).reshape(planes)
    return made


@pytest.mark.parametrize("axes", AXES)
def test_without_resampling_every_voxel_comes_back(grid, axes):
    prepared = prepare(grid, [("ct", slot(axes=axes))])
    labels = dark(prepared.array[0])

    assert np.array_equal(prepared.labels_back(labels), dark(grid.values))
    assert np.array_equal(prepared.values_back(prepared.array[0]), grid.values.astype(np.float32))


@pytest.mark.parametrize("axes", AXES)
def test_each_axis_of_the_array_runs_where_its_letter_says(grid, axes):
    prepared = prepare(grid, [("ct", slot(axes=axes))])
    opposite = dict(zip("SPLIAR", "IARSPL", strict=True))

    for number, letter in enumerate(axes):
        canonical = next(n for n, own in enumerate("SPL") if letter in (own, opposite[own]))
        slope = np.diff(prepared.values_back(_ramp(prepared, number)), axis=canonical)
        assert (np.sign(slope) == (1 if letter in "SPL" else -1)).all()


def _ramp(prepared, axis):
    shape = [1, 1, 1]
    shape[axis] = -1
    ramp = np.arange(prepared.array.shape[1 + axis], dtype=np.float32).reshape(shape)
    return np.broadcast_to(ramp, prepared.array.shape[1:]).copy()


@pytest.mark.parametrize("spacing", [(3.0, 4.0, 5.0), (9.0, 9.0, 9.0)])
def test_values_lie_at_their_true_places(grid, spacing):
    """A linear field is reproduced by linear interpolation, wherever the planes lie."""
    places = field(grid)
    wanted = 2.0 * places[0] - 1.5 * places[1] + 0.5 * places[2]
    made = _with_values(grid, wanted)
    prepared = prepare(made, [("ct", slot(spacing=spacing))])
    frame = prepared.frame

    axes = [start + step * np.arange(count) for start, step, count in zip(*_columns(frame), strict=True)]
    k, j, i = np.meshgrid(*axes, indexing="ij")
    truth = 2.0 * k - 1.5 * j + 0.5 * i
    inner = tuple(slice(max(n // 4, 1), n - max(n // 4, 1)) for n in prepared.array.shape[1:])
    assert np.abs(prepared.array[0][inner] - truth[inner]).max() < 0.02

    back = prepared.values_back(prepared.array[0])
    middle = tuple(slice(n // 3, n - n // 3) for n in grid.shape)
    assert np.abs(back[middle] - wanted[middle]).max() < 0.05


def _with_values(grid, values):
    from dataclasses import replace

    return replace(grid, values=values.astype(np.float32))


def _columns(frame):
    return frame.start, frame.step, frame.count


@pytest.mark.parametrize(("axes", "spacing"), [("LIA", (4.0, 4.0, 4.0)), ("RAS", (3.0, 3.0, 8.0))])
def test_a_mask_comes_back_where_it_was_on_its_own_side(grid, axes, spacing):
    truth = np.zeros(grid.shape, bool)
    n, m, o = (size // 4 for size in grid.shape)
    truth[n : 3 * n, m : 2 * m, o : 3 * o] = True  # a block in front, and another on one side of it, low
    truth[n : 2 * n, m : 3 * m, o : 2 * o] = True
    prepared = prepare(_with_values(grid, truth * 1000.0), [("ct", slot(axes=axes, spacing=spacing))])

    back = prepared.labels_back((prepared.array[0] >= 500).astype(np.uint8))

    assert dice(back == 1, truth) > 0.93
    for axis in range(3):
        assert dice(np.flip(back, axis) == 1, truth) < 0.85


def test_whole_voxels_are_cut_and_padded_without_blur(grid):
    prepared = prepare(grid, [("ct", slot(shape=(30, 50, 101)))])

    assert prepared.array.shape == (1, 30, 50, 101)
    if prepared.frame is not None and grid.stack == 0:
        common = np.isin(np.round(prepared.array[0]), np.round(grid.values.astype(np.float32)))
        assert common.mean() > (0.99 if _even(grid) else 0.0)


def _even(grid):
    return np.ptp(np.diff(grid.positions)) < 0.01 and np.ptp(grid.origins @ grid.directions[1]) < 0.01


def test_a_box_comes_back_to_its_voxels(grid):
    """The box of one bright block, seen in the network's array, is the block's own."""
    block = tuple(slice(n // 3, n // 3 + max(n // 5, 3)) for n in grid.shape)
    values = np.zeros(grid.shape)
    values[block] = 1000.0
    for axes, spacing in itertools.product(["SPL", "LIA", "RAS"], [None, (2.0, 2.0, 2.0)]):
        prepared = prepare(_with_values(grid, values), [("ct", slot(axes=axes, spacing=spacing))])
        places = np.argwhere(prepared.array[0] >= 500)
        edges = [(float(low), float(high + 1)) for low, high in zip(places.min(0), places.max(0), strict=True)]

        back = prepared.edges_back(edges)

        for axis, ((low, high), own) in enumerate(zip(back, block, strict=True)):
            sheared = 1.0 if _even(grid) else 3.0
            allowed = 0.01 if spacing is None else sheared + 2.0 / grid.spacing[axis]
            assert abs(low - own.start) <= allowed
            assert abs(high - own.stop) <= allowed


def test_intensities_are_clipped_and_scaled_as_the_manifest_says():
    values = np.array([-2000, -1000, 0, 400, 3000], np.float32)
    scaled(values, Intensity(clip=(-1000, 400), scale="range", to=(-1, 1)))
    assert values.tolist() == pytest.approx([-1, -1, 3 / 7, 1, 1])

    values = np.arange(101, dtype=np.float32)
    scaled(values, Intensity(clip_percentiles=(2, 98), scale="range"))
    assert values[[0, 2, 50, 98, 100]].tolist() == pytest.approx([0, 0, 0.5, 1, 1])

    values = np.array([0, 0, 1, 3], np.float32)
    scaled(values, Intensity(scale="zscore", over="positive"))
    assert values.tolist() == pytest.approx([-2, -2, -1, 1])

    values = np.array([100.0, 300.0], np.float32)
    scaled(values, Intensity(scale="zscore", mean=200.0, std=50.0))
    assert values.tolist() == pytest.approx([-2, 2])
