"""Frames that imagecodecs decodes are what pydicom's other decoders make of them, several at a time."""

from __future__ import annotations

import subprocess
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import iter_pixels
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from dicom_node import codecs, decoders
from dicom_node.decoders import lets_others_run
from dicom_node.errors import InputRefused
from dicom_node.images import decoded
from tests.conformance.cases import enhanced_from
from tests.datasets import EXPLICIT, as_file, ct, write
from workers import volume
from workers.volume import load

SLICES = 6
SIZE = 56


def stored(number: int, *, bits: int, is_signed: bool) -> np.ndarray:
    """Values up to both ends of their range, in no order that a mirror or a swap of bytes would leave as it is."""
    kind = np.dtype(f"{'i' if is_signed else 'u'}{1 if bits == 8 else 2}")
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if is_signed else (0, (1 << bits) - 1)
    values = np.random.default_rng(number).integers(low, high, (SIZE, SIZE), endpoint=True)
    values[:2] = [[low] * SIZE, [high] * SIZE]
    values[:, 2] = np.linspace(low, high, SIZE)
    return values.astype(kind)


def plain(number: int, path: Path, *, bits: int = 16, is_signed: bool = True) -> Path:
    image = as_file(ct(number), EXPLICIT)
    image.Rows = image.Columns = SIZE
    values = stored(number, bits=bits, is_signed=is_signed)
    image.BitsAllocated, image.BitsStored, image.HighBit = values.itemsize * 8, bits, bits - 1
    image.PixelRepresentation = int(is_signed)
    image.PixelData = values.tobytes()
    image["PixelData"].VR = "OB" if bits == 8 else "OW"
    image.save_as(path, enforce_file_format=True)
    return path


def whole(path: Path) -> Path:
    """Give an image what an enhanced object takes over from it."""
    image = dcmread(path)
    image.SpecificCharacterSet, image.SeriesNumber, image.PositionReferenceIndicator = "ISO_IR 100", 1, ""
    for keyword in ("PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
        image.setdefault(keyword, "")
    image.FrameOfReferenceUID = "2.25.52"
    for keyword in ("StudyDate", "StudyTime", "SliceThickness", "RescaleType"):
        image.setdefault(keyword, None)
    image.save_as(path)
    return path


def compressed(number: int, path: Path, syntax: str = JPEG2000Lossless) -> Path:
    image = dcmread(plain(number, path.with_suffix(".plain")))
    image.compress(syntax, generate_instance_uid=False)
    image.save_as(path, enforce_file_format=True)
    return path


def header(path: Path) -> Dataset:
    return dcmread(path, stop_before_pixels=True)


def by_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as without:
        without.setattr(codecs, "decodes", lambda *_: False)
        [values] = decoded(path, header(path), [0])
    return values


@pytest.fixture
def taken(monkeypatch):
    """How many frames imagecodecs has decoded."""
    taken = []
    for syntax, decode in codecs._DECODE.items():
        monkeypatch.setitem(
            codecs._DECODE,  # type: ignore[arg-type]
            syntax,
            lambda frame, decode=decode: (decode(frame), taken.append(len(frame)))[0],
        )
    return taken


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.peer("gdcmconv")
@pytest.mark.parametrize(
    "command",
    [
        *("dcmcjpeg +e1", "dcmcjpeg +el", "dcmcjpeg +el +sv 2", "dcmcjpeg +el +sv 7", "dcmcjpls +el", "dcmcjpls +en"),
        *("gdcmconv --jpeg", "gdcmconv --jpegls", "gdcmconv --j2k"),
    ],
)
@pytest.mark.parametrize(("bits", "is_signed"), [(8, False), (12, False), (12, True), (16, False), (16, True)], ids=str)
def test_a_frame_is_what_other_decoders_make_of_it(tmp_path, tool, taken, monkeypatch, command, bits, is_signed):
    path, packed = plain(1, tmp_path / "plain.dcm", bits=bits, is_signed=is_signed), tmp_path / "packed.dcm"
    program, *options = command.split()
    if "+en" in options and is_signed:
        pytest.skip("DCMTK encodes no signed values with loss")
    subprocess.run([tool(program), *options, path, packed], check=True, capture_output=True)

    [values] = decoded(packed, header(packed), [0])

    assert taken, "imagecodecs has decoded it"
    others = by_others(packed, monkeypatch)
    assert values.dtype == others.dtype
    assert np.array_equal(values, others)
    if "+en" not in options:
        assert np.array_equal(values, stored(1, bits=bits, is_signed=is_signed))


@pytest.mark.parametrize(
    "name",
    [
        *("MR_small_jp2klossless.dcm", "J2K_pixelrep_mismatch.dcm", "693_J2KI.dcm", "JPEG2000.dcm"),
        *("MR_small_jpeg_ls_lossless.dcm", "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm"),
    ],
)
def test_files_of_many_makers_are_decoded_as_ever(name, monkeypatch, taken):
    path = Path(get_testdata_file(name))
    [values] = decoded(path, header(path), [0])

    assert taken, "imagecodecs has decoded it"
    others = by_others(path, monkeypatch)
    assert values.dtype == others.dtype
    assert np.array_equal(values, others)


def test_colour_is_left_to_others(taken):
    path = Path(get_testdata_file("examples_jpeg2k.dcm"))

    [values] = decoded(path, header(path), [0])

    assert values.shape[-1] == 3
    assert not lets_others_run(header(path))
    assert not taken


def test_what_imagecodecs_cannot_decode_another_may(tmp_path, monkeypatch):
    path = compressed(1, tmp_path / "1.dcm")

    def fails(_frame):
        raise RuntimeError("not this one")

    monkeypatch.setitem(codecs._DECODE, JPEG2000Lossless, fails)  # type: ignore[arg-type]

    assert np.array_equal(decoded(path, header(path), [0])[0], stored(1, bits=16, is_signed=True))


def test_a_frame_of_another_size_than_its_image_is_none_of_its(tmp_path, taken):
    path = compressed(1, tmp_path / "1.dcm")
    dataset = dcmread(path)
    dataset.Rows += 2
    dataset.save_as(path)

    with pytest.raises(InputRefused):
        decoded(path, header(path), [0])

    assert taken


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.parametrize("part", [0.2, 0.9, 0.99])
def test_lossless_jpeg_that_ends_too_early_is_not_made_up(tmp_path, tool, part, taken):
    path, packed = plain(1, tmp_path / "plain.dcm"), tmp_path / "packed.dcm"
    subprocess.run([tool("dcmcjpeg"), "+e1", path, packed], check=True, capture_output=True)
    dataset = dcmread(packed)
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([frame[: int(len(frame) * part) // 2 * 2]])
    dataset["PixelData"].VR = "OB"

    with pytest.raises(RuntimeError):
        list(iter_pixels(dataset, decoding_plugin=codecs.PLUGIN))

    assert not taken


@pytest.mark.parametrize("part", [0.2, 0.9, 0.99])
def test_jpeg_ls_that_ends_too_early_is_given_to_no_decoder(tmp_path, monkeypatch, part):
    """CharLS, whoever calls it, takes ten seconds to find out."""
    path = compressed(1, tmp_path / "1.dcm", JPEGLSLossless)
    dataset = dcmread(path)
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    dataset.PixelData = encapsulate([frame[: int(len(frame) * part) // 2 * 2]])
    dataset.save_as(path)
    monkeypatch.setattr(decoders, "iter_pixels", lambda *_, **__: pytest.fail("a decoder is asked"))

    with pytest.raises(InputRefused, match="a frame ends too early"):
        decoded(path, header(path), [0])


def test_the_slices_of_a_series_are_decoded_at_the_same_time(tmp_path, monkeypatch):
    """Each waits in its decoder until another is in its own: alone, none would be done."""
    paths = [compressed(number, tmp_path / f"{number}.dcm") for number in range(1, SLICES + 1)]
    both = threading.Barrier(2, timeout=60)
    decode = codecs._DECODE[JPEG2000Lossless]
    monkeypatch.setitem(codecs._DECODE, JPEG2000Lossless, lambda frame: (both.wait(), decode(frame))[1])  # type: ignore[arg-type]

    values = load(paths).grid.values

    assert np.array_equal(values, load([path.with_suffix(".plain") for path in paths]).grid.values)


def test_the_frames_of_one_object_are_decoded_in_parts_and_keep_their_places(tmp_path, monkeypatch, taken):
    path = enhanced_from([whole(plain(number, tmp_path / f"{number}.dcm")) for number in range(1, 11)], tmp_path)
    expected = load([path]).grid.values
    assert not any(np.array_equal(one, other) for one, other in pairwise(expected))
    enhanced = dcmread(path)
    enhanced.compress(JPEG2000Lossless, generate_instance_uid=False)
    enhanced.save_as(tmp_path / "packed.dcm")
    monkeypatch.setattr(volume, "_TOGETHER", 3)

    assert np.array_equal(load([tmp_path / "packed.dcm"]).grid.values, expected)
    assert len(taken) == len(expected) == 10


def test_only_what_lets_others_run_is_decoded_beside_others(tmp_path):
    assert lets_others_run(header(compressed(1, tmp_path / "wavelets.dcm")))
    assert not lets_others_run(header(compressed(1, tmp_path / "runs.dcm", RLELossless)))
    assert not lets_others_run(header(write(ct(1), tmp_path / "plain.dcm")))
