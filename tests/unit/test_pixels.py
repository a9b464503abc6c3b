"""Compressed pixels: every syntax that a decoder exists for, and a clear answer for the others."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import (
    HTJ2K,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node import decoders, images
from dicom_node.errors import InputRefused, NotApplicable
from dicom_node.images import decoded, read_source
from tests.conformance.test_kinds import image


def picture(bits=12, frames=1, signed=False):
    """A smooth picture that a lossy codec hardly changes, not the same in any two directions or frames."""
    rows, columns = np.indices((64, 80))
    top = 1 << bits
    pixels = np.stack([(rows * 20 + columns * 15 + 700 * n) % 3000 * (top - 1) // 3000 for n in range(frames)])
    if signed:
        return (pixels - top // 2).astype(np.int8 if bits == 8 else np.int16)
    return pixels.astype(np.uint8 if bits == 8 else np.uint16)


def written(path, pixels, bits=12, **values):
    made = image(
        *("1.2.840.10008.5.1.4.1.1.7", pixels if len(pixels) > 1 else pixels[0]),
        **{"Modality": "OT", "PhotometricInterpretation": "MONOCHROME2", "ConversionType": "WSD"},
        BitsStored=bits,
        HighBit=bits - 1,
        PixelRepresentation=int(pixels.dtype.kind == "i"),
        NumberOfFrames=len(pixels),
        **values,
    )
    made.save_as(path, enforce_file_format=True)
    return path


def header(path):
    return dcmread(path, stop_before_pixels=True)


def packed_by(tool, option, path):
    packed = path.with_name("packed.dcm")
    subprocess.run([tool("dcmcjpeg"), *option.split(), path, packed], check=True, capture_output=True)
    return packed


def frames_replaced(path, to, frames, syntax=None):
    """The file at `path`, its frames other ones, in what is called another syntax."""
    dataset = dcmread(path)
    dataset.PixelData = encapsulate(list(frames))
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    if syntax is not None:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(to, implicit_vr=False, little_endian=True, force_encoding=True)
    else:
        dataset.save_as(to)
    return to


@pytest.fixture
def jpeg12(tmp_path, tool):
    pixels = picture(frames=3)
    packed = packed_by(tool, "+ee +q 100", written(tmp_path / "plain.dcm", pixels))
    assert header(packed).file_meta.TransferSyntaxUID == JPEGExtended12Bit
    return packed, pixels


def differ(one, other):
    return np.abs(one.astype(int) - other.astype(int)).max()


# -- what only DCMTK decodes --------------------------------------------------------------------------------------


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.peer("dcmdjpeg")
def test_frames_of_twelve_bits_come_in_the_order_asked_for(jpeg12):
    packed, pixels = jpeg12

    values = decoded(packed, header(packed), [2, 0])

    assert [frame.shape for frame in values] == [(64, 80), (64, 80)]
    assert differ(values[0], pixels[2]) <= 8
    assert differ(values[1], pixels[0]) <= 8
    assert differ(values[0], pixels[0]) > 500


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.peer("dcmdjpeg")
@pytest.mark.parametrize("option", ["+ee +q 100", "+es +q 100", "+ep +q 100"])
@pytest.mark.parametrize("bits", [8, 12])
def test_every_lossy_process_of_jpeg_is_decoded(tmp_path, tool, option, bits):
    pixels = picture(bits)
    packed = packed_by(tool, option, written(tmp_path / "plain.dcm", pixels, bits))

    [values] = decoded(packed, header(packed), [0])

    assert differ(values, pixels[0]) <= 8


@pytest.mark.peer("dcmdjpeg")
def test_jpeg_of_twelve_bits_of_another_maker_is_decoded():
    path = Path(get_testdata_file("JPGExtended.dcm"))

    [values] = decoded(path, header(path), [0])

    assert values.shape == (1024, 256)
    assert [int(values[place]) for place in ((420, 140), (230, 120))] == [244, 95]


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.peer("dcmdjpeg")
def test_frames_found_by_an_extended_offset_table_are_decoded(jpeg12, tmp_path):
    packed, pixels = jpeg12
    dataset = dcmread(packed)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=3))
    dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(frames)
    dataset.save_as(tmp_path / "extended.dcm")

    [values] = decoded(tmp_path / "extended.dcm", header(tmp_path / "extended.dcm"), [1])

    assert differ(values, pixels[1]) <= 8


@pytest.mark.peer("dcmcjpeg")
def test_without_dcmtk_the_way_out_is_named(jpeg12, monkeypatch, tmp_path):
    packed, _ = jpeg12
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(InputRefused, match=r"JPEG Extended .* of 12 bits need .*apt-get install dcmtk"):
        decoded(packed, header(packed), [0])


@pytest.mark.peer("dcmcjpeg")
def test_a_script_of_the_environment_is_not_dcmtk(jpeg12, monkeypatch, tmp_path):
    packed, _ = jpeg12
    (tmp_path / "dcmdjpeg").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "dcmdjpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    with pytest.raises(InputRefused, match="apt-get install dcmtk"):
        decoded(packed, header(packed), [0])


@pytest.mark.peer("dcmcjpeg")
def test_what_dcmtk_reads_is_private_and_without_the_patient(jpeg12, monkeypatch, tmp_path):
    """A stand-in for dcmdjpeg keeps what it is given, and fails."""
    packed, _ = jpeg12
    scratch, kept, tools = tmp_path / "scratch", tmp_path / "kept", tmp_path / "tools"
    for folder in (scratch, kept, tools):
        folder.mkdir()
    program = tools / "dcmdjpeg"
    program.write_text(
        f'#!/bin/sh\ncp "$3" {kept}/input\nstat -c %a "$3" "$4" "$(dirname "$3")" > {kept}/modes\nexit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(decoders.tempfile, "tempdir", str(scratch))

    with pytest.raises(InputRefused, match="cannot be decoded by dcmdjpeg"):
        decoded(packed, header(packed), [1])

    assert list(scratch.iterdir()) == []
    assert (kept / "modes").read_text().split() == ["600", "600", "700"]
    given = dcmread(kept / "input")
    assert "PixelData" in given
    assert given.NumberOfFrames == 1
    assert not [element.keyword for element in given if "Patient" in element.keyword or "Date" in element.keyword]
    assert b"Doe" in packed.read_bytes()
    assert b"Doe" not in (kept / "input").read_bytes()


@pytest.mark.peer("dcmcjpeg")
def test_a_decoder_that_does_not_end_is_ended(jpeg12, monkeypatch, tmp_path):
    packed, _ = jpeg12
    program = tmp_path / "dcmdjpeg"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(decoders, "_LONGEST", 0.2)

    with pytest.raises(InputRefused, match="took dcmdjpeg more than"):
        decoded(packed, header(packed), [0])


# -- what pydicom's decoders decode -------------------------------------------------------------------------------


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.parametrize("option", ["+e1", "+el"])
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (16, False), (16, True)])
def test_lossless_jpeg_of_dcmtk_comes_back(tmp_path, tool, option, bits, signed):
    pixels = picture(bits, frames=2, signed=signed)
    packed = packed_by(tool, option, written(tmp_path / "plain.dcm", pixels, bits))

    values = decoded(packed, header(packed), [1, 0])

    assert [frame.dtype for frame in values] == [pixels.dtype] * 2
    assert np.array_equal(values, pixels[::-1])


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize(
    ("syntax", "signed"),
    [
        *((RLELossless, False), (RLELossless, True), (JPEG2000Lossless, False), (JPEG2000Lossless, True)),
        (JPEGLSLossless, False),  # pydicom's encoder takes no signed values; gdcm's does, see below
    ],
)
def test_lossless_syntaxes_come_back_signed_or_not(tmp_path, syntax, bits, signed):
    pixels = picture(bits, frames=2, signed=signed)
    dataset = dcmread(written(tmp_path / "plain.dcm", pixels, bits))
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(tmp_path / "packed.dcm")

    values = decoded(tmp_path / "packed.dcm", header(tmp_path / "packed.dcm"), [1, 0])

    assert [frame.dtype for frame in values] == [pixels.dtype] * 2
    assert np.array_equal(values, pixels[::-1])


@pytest.mark.parametrize("has_table", [True, False])
@pytest.mark.parametrize("fragments", [1, 2])
def test_frames_are_found_with_and_without_a_table_of_offsets(tmp_path, monkeypatch, has_table, fragments):
    """Where each is one fragment, the way to them is gone once."""
    pixels = picture(16, frames=7)
    dataset = dcmread(written(tmp_path / "plain.dcm", pixels, 16))
    dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
    frames = list(generate_frames(dataset.PixelData, number_of_frames=7))
    dataset.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=has_table)
    dataset.save_as(tmp_path / "packed.dcm")
    walks = []
    walk = decoders.parse_fragments
    monkeypatch.setattr(decoders, "parse_fragments", lambda file: walks.append(file) or walk(file))

    order = [6, 0, 3, 3, 5]
    values = decoded(tmp_path / "packed.dcm", header(tmp_path / "packed.dcm"), order)

    assert np.array_equal(values, pixels[order])
    assert len(walks) == (0 if has_table else 1)


@pytest.mark.parametrize("option", ["--jpeg", "--j2k", "--jpegls", "--rle"])
def test_lossless_syntaxes_of_gdcm_come_back(tmp_path, tool, option):
    pixels = picture(12, signed=True)
    path = written(tmp_path / "plain.dcm", pixels)
    packed = tmp_path / "packed.dcm"
    subprocess.run([tool("gdcmconv"), option, path, packed], check=True, capture_output=True)
    assert header(packed).file_meta.TransferSyntaxUID.is_compressed

    [values] = decoded(packed, header(packed), [0])

    assert np.array_equal(values, pixels[0])


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2K], ids=lambda uid: uid.name)
def test_high_throughput_jpeg_2000_comes_back(tmp_path, syntax):
    pixels = picture(16, frames=2)
    plain = written(tmp_path / "plain.dcm", pixels, 16)
    packed = frames_replaced(plain, tmp_path / "packed.dcm", map(imagecodecs.htj2k_encode, pixels), syntax)

    values = decoded(packed, header(packed), [1, 0])

    assert np.array_equal(values, pixels[::-1])


def deflated(frame):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(frame) + packer.flush()


@pytest.mark.parametrize(
    ("uid", "pack"), [("1.2.840.10008.1.2.8.1", deflated), ("1.2.840.10008.1.2.1.98", bytes)], ids=["deflated", "bare"]
)
@pytest.mark.parametrize(("bits", "signed"), [(8, False), (12, False), (16, True)])
def test_frames_that_are_only_packed_come_back(tmp_path, uid, pack, bits, signed):
    pixels = picture(bits, frames=3, signed=signed)[:, :63, :79]  # frames of an odd number of bytes
    plain = written(tmp_path / "plain.dcm", np.ascontiguousarray(pixels), bits)
    packed = frames_replaced(plain, tmp_path / "packed.dcm", (pack(one.tobytes()) for one in pixels), uid)

    values = decoded(packed, header(packed), [2, 0])

    assert [frame.dtype for frame in values] == [pixels.dtype] * 2
    assert np.array_equal(values, pixels[[2, 0]])


@pytest.mark.parametrize(("uid", "pack"), [("1.2.840.10008.1.2.8.1", deflated), ("1.2.840.10008.1.2.1.98", bytes)])
def test_a_packed_frame_that_is_too_short_is_refused(tmp_path, uid, pack):
    pixels = picture(16)
    plain = written(tmp_path / "plain.dcm", pixels, 16)
    cut = frames_replaced(plain, tmp_path / "cut.dcm", [pack(pixels.tobytes()[:-200])], uid)

    with pytest.raises(InputRefused, match="a frame ends too early"):
        decoded(cut, header(cut), [0])


def test_a_deflated_frame_does_not_grow_beyond_its_image(tmp_path):
    """256 MB of zeros deflate to a quarter of one; only what the image needs is ever made of it."""
    plain = written(tmp_path / "plain.dcm", picture(16), 16)
    packer = zlib.compressobj(wbits=-15)
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
    packed = frames_replaced(plain, tmp_path / "bomb.dcm", [bomb], "1.2.840.10008.1.2.8.1")

    tracemalloc.start()
    [values] = decoded(packed, header(packed), [0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert values.shape == (64, 80)
    assert peak < 50e6


# -- colour -------------------------------------------------------------------------------------------------------

_BARS = {  # row of the picture in pydicom's test files: colour
    5: (255, 0, 0),
    25: (0, 255, 0),
    45: (0, 0, 255),
    65: (0, 0, 0),
    75: (64, 64, 64),
    95: (255, 255, 255),
}


@pytest.mark.parametrize(
    "name",
    [
        *("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_dcmtk_+eb+cy+n1.dcm", "SC_rgb_dcmtk_+eb+cy+np.dcm"),
        *("SC_rgb_dcmtk_+eb+cy+s2.dcm", "SC_rgb_dcmtk_+eb+cy+s4.dcm", "SC_rgb_jpeg_dcmtk.dcm"),
        *("SC_rgb_jpeg_gdcm.dcm", "SC_rgb_jpeg_lossy_gdcm.dcm", "SC_rgb_gdcm_KY.dcm", "SC_rgb_rle.dcm"),
        *("SC_rgb_jls_lossy_line.dcm", "SC_rgb_jls_lossy_sample.dcm", "SC_ybr_full_422_uncompressed.dcm"),
    ],
)
def test_colour_comes_as_rgb_however_it_was_stored(name):
    path = Path(get_testdata_file(name))

    [values] = decoded(path, header(path), [0])

    assert values.shape == (100, 100, 3)
    for row, colour in _BARS.items():
        assert differ(values[row, 50], np.array(colour)) <= 12, row


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless], ids=lambda uid: uid.name)
def test_lossless_colour_comes_back(tmp_path, syntax):
    pixels = np.stack([picture(8)[0], picture(8)[0][::-1], picture(8)[0][:, ::-1]], axis=-1)
    dataset = image("1.2.840.10008.5.1.4.1.1.7", pixels, Modality="OT", PhotometricInterpretation="RGB")
    if syntax == JPEG2000Lossless:
        dataset.PhotometricInterpretation = "YBR_RCT"
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(tmp_path / "packed.dcm", enforce_file_format=True)

    [values] = decoded(tmp_path / "packed.dcm", header(tmp_path / "packed.dcm"), [0])

    assert np.array_equal(values, pixels)


def test_a_palette_becomes_rgb_compressed_or_not(tmp_path):
    path = Path(get_testdata_file("examples_palette.dcm"))
    dataset = dcmread(path)
    assert dataset.PhotometricInterpretation == "PALETTE COLOR"
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.save_as(tmp_path / "packed.dcm")

    plain, packed = (read_source([file]).pixels(0) for file in (path, tmp_path / "packed.dcm"))

    assert plain.shape == (dataset.Rows, dataset.Columns, 3)
    assert plain.dtype == np.uint8
    assert np.ptp(plain.astype(int), axis=-1).max() > 100
    assert np.array_equal(plain, packed)


# -- what cannot be decoded ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "name"),
    [
        ("1.2.840.10008.1.2.4.110", "JPEG XL Lossless"),
        ("1.2.840.10008.1.2.4.111", "JPEG XL JPEG Recompression"),
        ("1.2.840.10008.1.2.4.112", "JPEG XL"),
        ("1.2.840.10008.1.2.4.92", "JPEG 2000 Part 2"),
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile"),
        ("1.2.840.10008.1.2.4.102", "MPEG-4 AVC/H.264"),
        ("1.2.840.10008.1.2.4.107", "HEVC/H.265"),
        ("1.2.276.0.7230010.9", "1.2.276.0.7230010.9"),
    ],
)
def test_a_syntax_without_a_decoder_is_refused_by_name(tmp_path, uid, name):
    plain = written(tmp_path / "plain.dcm", picture())
    strange = frames_replaced(plain, tmp_path / "strange.dcm", [b"\xff\x0a" + b"\0" * 64], uid)

    with pytest.raises(InputRefused, match=f"pixels in {name}.* cannot be decoded here"):
        decoded(strange, header(strange), [0])


@pytest.mark.parametrize(
    "name",
    [
        *("JPGExtended.dcm", "SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_jpeg_gdcm.dcm", "MR_small_jp2klossless.dcm"),
        *("693_J2KI.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"),
    ],
)
@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_a_frame_that_is_cut_or_scrambled_is_refused(tmp_path, name, part):
    path = Path(get_testdata_file(name))
    [frame] = generate_frames(dcmread(path).PixelData, number_of_frames=1)
    cut = frames_replaced(path, tmp_path / "cut.dcm", [frame[: int(len(frame) * part) // 2 * 2] or b"\1\2" * 300])

    with pytest.raises(InputRefused):
        decoded(cut, header(path), [0])


@pytest.mark.parametrize("name", ["JPGExtended.dcm", "MR_small_RLE.dcm", "693_J2KI.dcm", "MR_small.dcm"])
def test_a_file_that_ends_too_early_is_refused(tmp_path, name):
    path = Path(get_testdata_file(name))
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(path.read_bytes()[:-1500])

    with pytest.raises(InputRefused):
        decoded(cut, header(path), [0])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless], ids=lambda uid: uid.name)
def test_fewer_frames_than_the_header_says_are_refused(tmp_path, syntax):
    dataset = dcmread(written(tmp_path / "plain.dcm", picture(frames=2)))
    if syntax == RLELossless:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.NumberOfFrames = 3
    dataset.save_as(tmp_path / "short.dcm")

    with pytest.raises(InputRefused):
        decoded(tmp_path / "short.dcm", header(tmp_path / "short.dcm"), [2])


def test_an_object_without_pixels_is_not_for_a_model(tmp_path):
    dataset = dcmread(written(tmp_path / "plain.dcm", picture()))
    del dataset.PixelData
    dataset.save_as(tmp_path / "empty.dcm")

    with pytest.raises(NotApplicable, match="no_pixel_data"):
        decoded(tmp_path / "empty.dcm", header(tmp_path / "empty.dcm"), [0])


def test_a_header_without_a_transfer_syntax_is_refused(tmp_path):
    path = written(tmp_path / "plain.dcm", picture())
    bare = header(path)
    del bare.file_meta
    (tmp_path / "noise.dcm").write_bytes(b"noise")

    with pytest.raises(InputRefused, match="no stated transfer syntax"):
        images.decoded(tmp_path / "noise.dcm", bare, [0])
