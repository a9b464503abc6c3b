"""Planes of labels as the bytes of pixel data: one bit for each pixel of a segment, or run lengths of all of them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.unsignedinteger]
"""Labels of shape `(rows, columns)`, 0 where nothing is."""


class Extent(NamedTuple):
    """Where in a plane a value is: its first row, the row after its last, and how many pixels it has."""

    first: int
    after: int
    pixels: int


_ITEM = b"\xfe\xff\x00\xe0"
_LONGEST_RUN = 128  # PS3.5 G.3.1
_TOGETHER = 8  # frames of any size that are whole bytes together


def extents(plane: Plane) -> dict[int, Extent]:
    """Return for each value but 0 of a plane where it is."""
    if not plane.any():
        return {}
    starts = _starts(plane)
    values, rows = plane.ravel()[starts], starts // plane.shape[1]
    pixels = np.bincount(values, np.diff(starts, append=plane.size)).astype(np.intp)
    pixels[0] = 0
    first, after = np.empty_like(pixels), np.empty_like(pixels)
    first[values[::-1]], after[values] = rows[::-1], rows + 1  # of several the last one counts
    found = np.flatnonzero(pixels)
    where = zip(*(each[found].tolist() for each in (first, after, pixels)), strict=True)
    return {value: Extent(*each) for value, each in zip(found.tolist(), where, strict=True)}


def _starts(plane: Plane) -> npt.NDArray[np.intp]:
    """Return the flat index at which each run of one value starts; no run crosses a row's end."""
    flat = plane.ravel()
    is_start = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=is_start[1:])
    is_start[:: plane.shape[1]] = True
    return np.flatnonzero(is_start)


# -- bits ---------------------------------------------------------------------------------------------------------


def bits(frames: Iterable[tuple[Plane, int, Extent]], shape: tuple[int, int]) -> Iterator[bytes]:
    """Yield frames as bits, the first pixel in the lowest bit, frames without a gap between them (PS3.5 8.1.1).

    A frame is a plane of labels, the value that becomes 1, and where that is.
    """
    if shape[1] % 8 == 0:
        return (_by_rows(plane, value, extent) for plane, value, extent in frames)
    return _across_frames((plane == value for plane, value, _ in frames), shape)


def _by_rows(plane: Plane, value: int, extent: Extent) -> bytes:
    first, after, _ = extent
    a_row = plane.shape[1] // 8
    packed = np.packbits(plane[first:after] == value, bitorder="little").tobytes()
    return bytes(first * a_row) + packed + bytes((plane.shape[0] - after) * a_row)


def _across_frames(masks: Iterable[npt.NDArray[np.bool_]], shape: tuple[int, int]) -> Iterator[bytes]:
    together: list[npt.NDArray[np.bool_]] = []
    for mask in masks:
        together.append(mask.ravel())
        if len(together) == _TOGETHER or (shape[0] * shape[1]) % 8 == 0:
            yield np.packbits(np.concatenate(together), bitorder="little").tobytes()
            together.clear()
    if together:
        yield np.packbits(np.concatenate(together), bitorder="little").tobytes()


def size_of_bits(frames: int, shape: tuple[int, int]) -> int:
    """Return how many bytes so many frames are as bits, without a padding byte."""
    return -(-frames * shape[0] * shape[1] // 8)


# -- fragments ----------------------------------------------------------------------------------------------------


def fragments(frames: Sequence[bytes]) -> list[bytes]:
    """Return encoded frames as items, one each, behind a table of their offsets (PS3.5 A.4), without the delimiter."""
    items = [piece for frame in frames for piece in (_ITEM + struct.pack("<L", len(frame)), frame)]
    offsets = accumulate((8 + len(frame) for frame in frames[:-1]), initial=0)
    table = struct.pack(f"<{len(frames)}L", *offsets)
    return [_ITEM + struct.pack("<L", len(table)) + table, *items]


# -- run lengths --------------------------------------------------------------------------------------------------


def run_lengths(plane: Plane, table: Plane | None = None) -> bytes:
    """Return a plane of one or two bytes a pixel in run lengths, high bytes first (PS3.5 Annex G).

    With a table, of shape `(values,)`, it is that of what the plane's values stand for there, which is looked up once
    for each run. A run is written as a run even if it is of one pixel: right for masks, wasteful for noise.
    """
    starts = _starts(plane)
    values = plane.ravel()[starts]
    if table is not None:
        values = table[values]
    of_bytes = [values] if values.dtype.itemsize == 1 else [values >> 8, values & 0xFF]
    segments = [_packed_runs(each.astype(np.uint8, copy=False), starts, plane) for each in of_bytes]
    offsets = [64]
    for segment in segments[:-1]:
        offsets.append(offsets[-1] + len(segment))
    head = struct.pack("<16L", len(segments), *offsets, *([0] * (15 - len(offsets))))
    return b"".join([head, *segments])


def _packed_runs(values: npt.NDArray[np.uint8], starts: npt.NDArray[np.intp], plane: Plane) -> bytes:
    """Return one RLE segment: for each run of up to 128 a pair of bytes, for one pixel (0, value).

    `values` are those of a plane from each of `starts` to the next; neighbours that are the same are one run.
    """
    is_start = starts % plane.shape[1] == 0
    is_start[1:] |= values[1:] != values[:-1]
    starts, values = starts[is_start], values[is_start]
    lengths = np.diff(starts, append=plane.size)
    pieces = -(-lengths // _LONGEST_RUN)
    counts = np.full(int(pieces.sum()), _LONGEST_RUN)
    ends = np.cumsum(pieces) - 1
    counts[ends] = lengths - (pieces - 1) * _LONGEST_RUN
    pairs = np.empty((len(counts), 2), np.uint8)
    pairs[:, 0] = (257 - counts) & 0xFF  # -(count - 1) in two's complement; 0 says one literal byte
    pairs[:, 1] = np.repeat(values, pieces)
    return pairs.tobytes()
