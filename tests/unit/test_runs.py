"""Frames in run lengths become what pydicom makes of them; whatever the bytes say, nothing is made beyond the image."""

from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
from pydicom.pixels.decoders.rle import _rle_decode_frame, _rle_decode_segment
from pydicom.pixels.encoders.native import _encode_segment

from dicom_node import runs
from dicom_node.elements import NotUnderstood
from dicom_node.results.packing import run_lengths
from dicom_node.runs import unpacked

CHANCE = np.random.default_rng(5)


def framed(*segments, number=None, starts=None):
    starts = starts or [64 + sum(map(len, segments[:n])) for n in range(len(segments))]
    head = struct.pack("<16L", len(segments) if number is None else number, *starts, *[0] * (15 - len(starts)))
    return head + b"".join(segments)


def by_pydicom(plane):
    """Run lengths as pydicom writes them: what repeats as runs, the rest as it is."""
    high_first = np.moveaxis(plane.view(np.uint8).reshape(*plane.shape, -1), -1, 0)[::-1]
    return framed(*(bytes(_encode_segment(each.tobytes(), plane.shape[1])) for each in high_first))


def noise(shape, dtype):
    return CHANCE.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def flat(shape, dtype):
    return np.full(shape, 300 % (np.iinfo(dtype).max + 1), dtype)


def organs(shape, dtype):
    rows, columns = np.indices(shape)
    return (((rows // 7 + columns // 11) % 5) * 77 + noise(shape, np.uint8) % 3).astype(dtype)


@pytest.mark.parametrize("dtype", ["<u1", "<u2"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 5), (7, 300), (300, 400)])
@pytest.mark.parametrize("make", [noise, flat, organs])
@pytest.mark.parametrize("pack", [by_pydicom, run_lengths])
def test_words_come_back(pack, make, shape, dtype):
    plane = make(shape, np.dtype(dtype))

    words = unpacked(pack(plane), plane.size, plane.itemsize)

    assert words.dtype == plane.dtype
    assert np.array_equal(words, plane.ravel())


@pytest.mark.parametrize("together", [1, 2, 3, 129, 1000])
@pytest.mark.parametrize("make", [noise, organs])
def test_it_does_not_matter_how_much_is_looked_at_together(monkeypatch, make, together):
    plane = make((40, 50), np.dtype("<u2"))
    monkeypatch.setattr(runs, "_TOGETHER", together)

    assert np.array_equal(unpacked(by_pydicom(plane), plane.size, 2), plane.ravel())


@pytest.mark.parametrize("way", [runs._by_bytes, runs._by_pieces])
def test_whatever_a_segment_says_both_ways_have_pydicoms_answer(monkeypatch, way):
    """Header bytes of every sort, those that stand for nothing among them; the last piece is cut off anywhere."""
    monkeypatch.setattr(runs, "_by_bytes", way)
    monkeypatch.setattr(runs, "_by_pieces", way)
    chance = random.Random(1)
    answers = 0
    for _ in range(500):
        segment = bytes(chance.choice((0, 1, 127, 128, 129, 255, chance.randrange(256))) for _ in range(300))
        segment = segment[: chance.randrange(1, 300)]
        expected = bytes(_rle_decode_segment(segment))
        for length in {1, len(expected) // 2 + 1, len(expected)} - {0}:
            if length > len(expected):
                continue
            assert unpacked(framed(segment), length, 1).tobytes() == expected[:length]
            answers += 1
        with pytest.raises(NotUnderstood):
            unpacked(framed(segment), len(expected) + 1, 1)
    assert answers > 1000


@pytest.mark.filterwarnings("ignore:The decoded RLE segment")
def test_frames_of_any_bytes_are_pydicoms_or_not_understood():
    chance = random.Random(2)
    plane = organs((20, 30), np.dtype("<u2"))
    good = by_pydicom(plane)
    understood = 0
    for _ in range(500):
        frame = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            frame[chance.choice((chance.randrange(12), chance.randrange(len(frame))))] = chance.randrange(256)
        frame = bytes(frame[: chance.choice((len(frame), chance.randrange(len(frame))))])
        try:
            words = unpacked(frame, plane.size, 2)
        except NotUnderstood:
            continue
        understood += 1
        assert words.tobytes() == bytes(_rle_decode_frame(frame, *plane.shape, 1, 16))
    assert understood > 50


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(framed(b"\0\1", b"\0\1")[:63], id="half a head"),
        pytest.param(framed(b"\0\1"), id="fewer segments"),
        pytest.param(framed(b"\0\1", b"\0\1", b"\0\1"), id="more segments"),
        pytest.param(framed(b"\0\1", b"\0\1", number=0xFFFFFFFF), id="segments without number"),
        pytest.param(framed(b"\0\1", b"\0\1", starts=[66, 64]), id="segments out of order"),
        pytest.param(framed(b"\0\1", b"\0\1", starts=[0, 66]), id="a segment in the head"),
        pytest.param(framed(b"\0\1", b"\0\1", starts=[64, 0xFFFFFFFF]), id="a segment beyond the end"),
        pytest.param(framed(b"\0\1", b""), id="an empty segment"),
        pytest.param(framed(b"\0\1", b"\x80" * 100), id="a segment of nothing"),
    ],
)
def test_a_frame_of_other_segments_is_not_understood(frame):
    with pytest.raises(NotUnderstood):
        unpacked(frame, 1, 2)


@pytest.mark.parametrize("way", [runs._by_bytes, runs._by_pieces])
@pytest.mark.parametrize("header", [0, 127, 128, 129, 255])
def test_what_is_beyond_the_image_costs_no_memory(monkeypatch, header, way):
    """A segment of runs would be sixty-four times as long, its bytes as objects forty times."""
    monkeypatch.setattr(runs, "_by_bytes", way)
    monkeypatch.setattr(runs, "_by_pieces", way)
    segment = bytes([header, 7]) * 2_000_000
    frame = framed(segment)
    tracemalloc.start()
    try:
        unpacked(frame, 1000, 1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < len(segment) + 12_000_000
