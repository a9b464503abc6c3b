"""A file in pieces is the file that pydicom writes, and what makes its pixels can be read like a file."""

from __future__ import annotations

import os
import random
from io import BytesIO

import numpy as np
import pytest
from pydicom.encaps import encapsulate

from bench import large
from dicom_node.created import created_results
from dicom_node.results import pieces as module
from dicom_node.results.packing import fragments
from dicom_node.results.pieces import Pixels, pieces

WHOLE = np.random.default_rng(5).bytes(1000)


@pytest.fixture(params=[1, 7, 100, 999, 1000])
def pixels(request):
    return Pixels(lambda: (WHOLE[at : at + request.param] for at in range(0, len(WHOLE), request.param)), len(WHOLE))


def test_pixels_are_read_from_wherever_a_reader_goes(pixels):
    chance, expected = random.Random(6), BytesIO(WHOLE)
    for _ in range(300):
        if chance.random() < 0.4:
            whence = chance.choice([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])
            offset = 0 if whence == os.SEEK_END else chance.randrange(300)
            assert pixels.seek(offset, whence) == expected.seek(offset, whence)
        size = chance.choice([-1, 0, 1, 6, 7, 8, 250, 2000])
        assert pixels.read(size) == expected.read(size)
        assert pixels.tell() == expected.tell()
    assert b"".join(pixels.pieces()) == WHOLE


def test_asking_how_long_they_are_makes_none_of_them():
    made = Pixels(lambda: pytest.fail("made"), 10)

    assert (made.seek(0, os.SEEK_END), made.tell(), made.read(), len(made)) == (10, 10, b"", 10)


@pytest.mark.parametrize("large", [0, 200, 1 << 20])
def test_a_file_in_pieces_has_the_bytes_that_pydicom_writes(monkeypatch, large):
    monkeypatch.setattr(module, "_LARGE", large)
    results = created_results()
    for result in results:
        expected = BytesIO()
        result.dataset.save_as(expected, enforce_file_format=True)

        assert b"".join(pieces(result.dataset)) == expected.getvalue(), (result.kind, result.form)
    assert {result.form for result in results} >= {"", "LABELMAP"}


def test_frames_become_the_items_that_pydicom_makes_of_them():
    frames = [b"ab", b"abcd" * 9, b"xy"]

    assert b"".join(fragments(frames)) == encapsulate(frames)


def test_a_segmentation_of_many_frames_is_written_and_checked_in_less_memory_than_it_has_bytes():
    told = large.measured(60, 40, "BINARY")

    assert (told["frames"], told["megabytes"] > 78) == (2400, True)
    assert told["peak"] < 40


@pytest.mark.slow
def test_a_hundred_structures_on_a_thousand_slices_need_no_more_memory_than_their_functional_groups():
    told = large.measured(1000, 100, "BINARY")

    assert (told["frames"], told["megabytes"] > 3200) == (100_000, True)
    assert told["peak"] < 300
