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
