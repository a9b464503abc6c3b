"""Bits and run lengths are what pydicom reads back, whatever the size of a frame."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.pixels.decoders.rle import _rle_decode_frame
from pydicom.pixels.utils import unpack_bits

from dicom_node.results.packing import bits, extents, run_lengths, size_of_bits

SHAPES = [(16, 24), (16, 8), (6, 12), (5, 7), (1, 1), (3, 1), (1, 300)]


def labels(shape, frames=11, dtype=np.uint8, values=4):
    """Blobs that are nowhere the same, mirrored or not; the last plane is empty, the first is full."""
    chance = np.random.default_rng(3)
    made = chance.integers(0, values, (frames, *shape)).astype(dtype)
    made[chance.random(made.shape) < 0.6] = 0
    made[:, : shape[0] // 3] = 0
    made[0], made[-1] = 2, 0
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_frames_of_any_size_are_packed_without_a_gap(shape):
    planes = labels(shape)
    contents = [extents(plane) for plane in planes]
    frames = [(n, value) for value in (1, 2, 3) for n in range(len(planes)) if value in contents[n]]

    packed = b"".join(bits(((planes[n], value, contents[n][value]) for n, value in frames), shape))

    assert len(packed) == size_of_bits(len(frames), shape)
    unpacked = unpack_bits(packed)[: len(frames) * shape[0] * shape[1]].reshape(-1, *shape)
    expected = np.stack([planes[n] == value for n, value in frames])
    assert np.array_equal(unpacked, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_extent_of_a_value_is_that_of_its_pixels(shape):
    for plane in labels(shape):
        found = extents(plane)

        assert set(found) == set(np.unique(plane).tolist()) - {0}
        for value, extent in found.items():
            rows = np.flatnonzero((plane == value).any(axis=1))
            assert extent == (rows[0], rows[-1] + 1, np.count_nonzero(plane == value))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 129), (4, 1000)])
def test_run_lengths_are_read_back(shape, dtype):
    planes = labels(shape, dtype=dtype) * (1 if dtype is np.uint8 else 77)
    planes[1] = 0
    planes[1, -1, -1] = 1

    for plane in planes:
        encoded = run_lengths(plane)
        assert len(encoded) % 2 == 0
        decoded = _rle_decode_frame(encoded, *shape, 1, 8 * dtype().itemsize)
        assert np.array_equal(np.frombuffer(decoded, dtype).reshape(shape), plane)


def test_a_run_ends_with_its_row():
    encoded = run_lengths(np.full((3, 200), 7, np.uint8))

    assert encoded[64:] == bytes([257 - 128, 7, 257 - 72, 7]) * 3


@pytest.mark.parametrize(("dtype", "highest"), [(np.uint8, 255), (np.uint16, 255), (np.uint16, 1000)])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1000)])
def test_run_lengths_through_a_table_are_those_of_what_it_makes(shape, dtype, highest):
    """Values that become the same are one run; so are two-byte values that have one of their bytes in common."""
    table = np.zeros(np.iinfo(dtype).max + 1, np.uint8 if highest <= 255 else np.uint16)
    table[[1, 2, 3]] = highest, highest, highest - 256 if highest > 255 else 7

    for plane in labels(shape, dtype=dtype):
        encoded = run_lengths(plane, table)

        assert encoded == run_lengths(table[plane])
        decoded = _rle_decode_frame(encoded, *shape, 1, 8 * table.itemsize)
        assert np.array_equal(np.frombuffer(decoded, table.dtype).reshape(shape), table[plane])


def test_neighbours_that_a_table_makes_the_same_are_one_run():
    table = np.zeros(256, np.uint8)
    table[[1, 2]] = 9

    encoded = run_lengths(np.array([[1, 2, 1, 3, 0, 2]], np.uint8), table)

    assert encoded[64:] == bytes([257 - 3, 9, 257 - 2, 0, 0, 9])


def test_planes_that_are_a_part_of_an_array_are_packed_as_they_look():
    whole = labels((40, 60))
    part = whole[:, 3:33:2, 50:10:-3]

    for plane in part:
        assert run_lengths(plane) == run_lengths(plane.copy())
        assert extents(plane) == extents(plane.copy())
