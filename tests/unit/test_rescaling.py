"""The short way from the words of pixel data to values gives what the long way gives, for every word there is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from workers.rescaling import Meanings, scaled

WORDS = np.arange(1 << 16, dtype="<u2").reshape(256, 256)


def header(bits=16, signed=True, modality="CT", **values):
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.Modality = CTImageStorage, modality
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, bits, bits - 1
    made.PixelRepresentation, made.SamplesPerPixel = int(signed), 1
    made.PhotometricInterpretation, made.Rows, made.Columns = "MONOCHROME2", 256, 256
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def meaning(image, slope, intercept, dtype=np.int16):
    piece = SimpleNamespace(instance=0, slope=slope, intercept=intercept)
    return Meanings(SimpleNamespace(shared=lambda _: image), np.dtype(dtype)).of(piece, 1.0)


def by_the_long_way(image, slope, intercept, dtype=np.int16):
    image.PixelData = WORDS.tobytes()
    image["PixelData"].VR = "OW"
    piece = SimpleNamespace(slope=slope, intercept=intercept)
    return scaled(image.pixel_array, piece, image, np.dtype(dtype), 1.0)


def written(found, into):
    found.write(WORDS, into)
    return into


@given(
    bits=st.integers(9, 16),
    signed=st.booleans(),
    slope=st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.5]),
    intercept=st.sampled_from([0.0, -1024.0, -8192.0, 100.0, 32767.0, -32768.0, 40000.0]),
    modality=st.sampled_from(["CT", "MR"]),
    padding=st.none() | st.sampled_from([0, 1, -2000, 63536 - 65536, 5]),
    dtype=st.sampled_from([np.int16, np.float32]),
)
def test_every_word_becomes_what_it_is(bits, signed, slope, intercept, modality, padding, dtype):
    values = {} if padding is None or (padding < 0 and not signed) else {"PixelPaddingValue": padding}
    image = header(bits, signed, modality, **values)

    made = written(meaning(image, slope, intercept, dtype), np.empty(WORDS.shape, dtype))

    assert np.array_equal(made, by_the_long_way(image, slope, intercept, dtype))


@pytest.mark.parametrize(
    ("image", "intercept"),
    [
        (header(16, True), 0.0),
        (header(16, True), -1024.0),
        (header(16, True, PixelPaddingValue=-2000), -1024.0),
        (header(12, False), -1024.0),
        (header(12, False, PixelPaddingValue=0), -1024.0),
        (header(12, True), -1024.0),
        (header(12, False, "MR"), 0.0),
        (header(16, True, "MR"), 0.0),
        (header(15, False, "MR"), 0.0),
    ],
)
def test_what_is_common_has_a_short_way(image, intercept):
    assert meaning(image, 1.0, intercept).steps is not None


@pytest.mark.parametrize(
    ("image", "slope", "intercept"),
    [
        (header(16, False), 1.0, 0.0),  # above 32767 it is clipped, where a step would go round
        (header(12, False), 2.0, -1024.0),
        (header(12, False, PixelPaddingValue=3000), 1.0, -1024.0),
        (header(16, True), 1.0, 100.0),
    ],
)
def test_what_the_steps_would_get_wrong_has_none(image, slope, intercept):
    assert meaning(image, slope, intercept).steps is None


def test_the_values_may_be_wanted_mirrored():
    image = header(12, False)
    into = np.empty(WORDS.shape, np.int16)

    meaning(image, 1.0, -1024.0).write(WORDS, into[::-1, ::-1])

    assert np.array_equal(into[::-1, ::-1], by_the_long_way(image, 1.0, -1024.0))
