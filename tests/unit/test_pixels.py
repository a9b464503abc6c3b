"""Compressed pixels: every syntax that a decoder exists for, and a clear answer for the others."""

from __future__ import annotations

import re
import subprocess

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGExtended12Bit

from dicom_node import images
from dicom_node.errors import InputRefused
from dicom_node.images import decoded
from tests.conformance.test_kinds import image


def plain(folder, bits=12, frames=1):
    """A smooth picture that a lossy codec hardly changes."""
    rows, columns = np.indices((64, 80))
    pixels = np.stack([(rows * 20 + columns * 15 + 100 * n) % (1 << bits) for n in range(frames)]).astype(np.uint16)
    made = image(
        *("1.2.840.10008.5.1.4.1.1.2", pixels if frames > 1 else pixels[0]),
        Modality="CT",
        PhotometricInterpretation="MONOCHROME2",
        BitsStored=bits,
        HighBit=bits - 1,
    )
    path = folder / "plain.dcm"
    made.save_as(path, enforce_file_format=True)
    return path, pixels


def header(path):
    return dcmread(path, stop_before_pixels=True)


@pytest.fixture
def jpeg12(tmp_path, tool):
    path, pixels = plain(tmp_path)
    packed = tmp_path / "packed.dcm"
    subprocess.run([tool("dcmcjpeg"), "+ee", "+q", "100", path, packed], check=True)
    assert header(packed).file_meta.TransferSyntaxUID == JPEGExtended12Bit
    return packed, pixels


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.peer("dcmdjpeg")
def test_jpeg_of_twelve_bits_is_decoded_by_dcmtk(jpeg12):
    packed, pixels = jpeg12

    [values] = decoded(packed, header(packed), [0])

    assert np.abs(values.astype(int) - pixels[0]).max() <= 4
    assert np.abs(values.astype(int) - pixels[0][::-1]).max() > 100


@pytest.mark.peer("dcmcjpeg")
def test_without_dcmtk_the_way_out_is_named(jpeg12, monkeypatch):
    packed, _ = jpeg12
    monkeypatch.setattr(images.shutil, "which", lambda name: None)

    with pytest.raises(InputRefused, match="apt-get install dcmtk"):
        decoded(packed, header(packed), [0])


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.peer("dcmdjpeg")
def test_a_cut_file_of_twelve_bits_is_refused_and_nothing_is_left_behind(jpeg12, tmp_path, monkeypatch):
    packed, _ = jpeg12
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(packed.read_bytes()[:-900])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(images.tempfile, "tempdir", str(scratch))

    with pytest.raises(InputRefused):
        decoded(cut, header(packed), [0])
    assert list(scratch.iterdir()) == []


@pytest.mark.peer("dcmcjpeg")
@pytest.mark.parametrize("option", ["+e1", "+el"])
def test_lossless_jpeg_of_dcmtk_comes_back(tmp_path, tool, option):
    path, pixels = plain(tmp_path)
    packed = tmp_path / "packed.dcm"
    subprocess.run([tool("dcmcjpeg"), option, path, packed], check=True)

    [values] = decoded(packed, header(packed), [0])

    assert np.array_equal(values, pixels[0])


@pytest.mark.parametrize("uid", ["1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.112", "1.2.840.10008.1.2.4.102"])
def test_a_syntax_without_a_decoder_is_refused_by_name(tmp_path, uid):
    path, _ = plain(tmp_path)
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = known = "1.2.840.10008.1.2.4.102"
    dataset.PixelData = encapsulate([b"\xff\x0a" + b"\0" * 64])
    dataset["PixelData"].VR = "OB"
    strange = tmp_path / "strange.dcm"
    dataset.save_as(strange, enforce_file_format=True)
    strange.write_bytes(strange.read_bytes().replace(known.encode(), uid.encode()))  # pydicom 3.0 writes no new ones
    name = header(strange).file_meta.TransferSyntaxUID.name

    with pytest.raises(InputRefused, match=f"pixels in {re.escape(name)} cannot be decoded here"):
        decoded(strange, header(strange), [0])
