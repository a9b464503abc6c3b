"""Hostile Part 10 files: what a header may claim, nest and deflate; and real files, tampered with."""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from tests.datasets import DEFLATED, EXPLICIT, as_file, ct, encoded
from tests.fuzz.mutation import mutated_dataset, nested

REAL = (
    "CT_small.dcm",
    "MR_small_implicit.dcm",
    "MR_small_bigendian.dcm",
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "MR_small_jpeg_ls_lossless.dcm",
    "SC_rgb_jpeg_dcmtk.dcm",
    "image_dfl.dcm",
    "SC_rgb_rle_2frame.dcm",
    "examples_palette.dcm",
    "rtdose.dcm",
    "nested_priv_SQ.dcm",
)
"""Files that come with pydicom: each transfer syntax, sequences, several frames, colour."""

_ITEM, _SEQUENCE_END = b"\xfe\xff\x00\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"
_OPEN = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff"  # Referenced Series Sequence, of undefined length


def items(count: int) -> bytes:
    """Return a sequence of empty items (explicit VR little endian): eight bytes each, an object each for its reader."""
    return _OPEN + _ITEM * count + _SEQUENCE_END


def claiming(value: int) -> bytes:
    """Return a private element of VR OB that claims `value` bytes and has none."""
    return b"\x09\x00\x10\x00LO\x04\x00TEST" + b"\x09\x00\x01\x10OB\0\0" + struct.pack("<I", value)


def part10(data: bytes, syntax: str = EXPLICIT) -> bytes:
    """Return a file with this data set, whatever that is."""
    buffer = BytesIO()
    small = as_file(ct(1), syntax)
    small.save_as(buffer, enforce_file_format=True)
    content = buffer.getvalue()
    return content[: 144 + int.from_bytes(content[140:144], "little")] + data


def bomb(megabytes: int) -> bytes:
    """Return a deflated data set that becomes this large: a private value of zeros, then an image."""
    head, rest = encoded(ct(1)), b""
    at = head.index(b"\x10\x00\x10\x00")  # Patient's Name: the private element goes before it
    head, rest = head[:at], head[at:]
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    made = compressor.compress(head + claiming(megabytes << 20))
    for _ in range(megabytes):
        made += compressor.compress(bytes(1 << 20))
    made += compressor.compress(rest) + compressor.flush()
    return made + b"\0" * (len(made) % 2)


def deflated(data: bytes) -> bytes:
    """Return a data set as it travels in the deflated transfer syntax."""
    compressor = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    made = compressor.compress(data) + compressor.flush()
    return made + b"\0" * (len(made) % 2)


def _image(syntax: str = EXPLICIT, **elements: object) -> bytes:
    dataset = ct(1, **elements)
    if "PixelData" in elements:
        dataset.PixelData = elements["PixelData"]
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
    buffer = BytesIO()
    as_file(dataset, syntax).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _jpeg2000(rows: int, columns: int) -> bytes:
    """Return a codestream whose head says that it is this large (ISO 15444-1 A.5.1), and which ends there."""
    whole = dcmread(str(get_testdata_file("MR_small_jp2klossless.dcm")))
    stream = bytearray(whole.PixelData[whole.PixelData.index(b"\xff\x4f\xff\x51") :])
    struct.pack_into(">IIII", stream, 8, columns, rows, 0, 0)
    struct.pack_into(">IIII", stream, 24, columns, rows, 0, 0)
    return bytes(stream)


def crafted() -> Iterator[tuple[str, bytes]]:
    """Yield `(name, file)`."""
    yield "empty", b""
    yield "prefix", b"\0" * 128 + b"DICM"
    yield "meta-4gb", b"\0" * 128 + b"DICM\x02\x00\x00\x00UL\x04\x00\xff\xff\xff\xff"
    yield "meta-items", b"\0" * 128 + b"DICM\x02\x00\x00\x00UL\x04\x00\xff\xff\xff\x7f" + items(500_000)
    yield "deep", part10(nested(10_000))
    yield "deep-image", part10(_place_first(nested(10_000)))
    yield "items", part10(_place_first(items(500_000)))
    yield "items-deflated", part10(deflated(_place_first(items(1_000_000))), DEFLATED)
    sequence = _ITEM * 500_000
    defined = b"\x08\x00\x15\x11SQ\0\0" + struct.pack("<I", len(sequence)) + sequence
    yield "items-of-known-length", part10(_place_first(defined))
    for claim in (2**31 - 2, 2**31, 2**32 - 2):
        yield f"claims-{claim:x}", part10(_place_first(claiming(claim)))
    yield "bomb-400", part10(bomb(400), str(DeflatedExplicitVRLittleEndian))
    yield "bomb-of-nothing", part10(deflated(b""), DEFLATED)
    yield "deflated-garbage", part10(b"\xff" * 1000, DEFLATED)
    yield "deflated-cut", part10(encoded(ct(1), DEFLATED)[:200], DEFLATED)
    yield "65535-square", _image(Rows=65535, Columns=65535)
    yield "frames-2-31", _image(NumberOfFrames=2**31 - 1)
    yield "frames-negative", _image(NumberOfFrames=-5)
    yield "no-pixel-size", _image(Rows=0, Columns=0)
    yield "bits-255", _image(BitsAllocated=255, BitsStored=255, HighBit=254)
    yield "bits-0", _image(BitsAllocated=0, BitsStored=0)
    yield "samples-65535", _image(SamplesPerPixel=65535)
    yield "odd-photometric", _image(PhotometricInterpretation="NOTHING")
    yield "palette-without-palette", _image(PhotometricInterpretation="PALETTE COLOR")
    for name, syntax in (
        ("rle", RLELossless),
        ("jpeg", JPEGBaseline8Bit),
        ("jls", JPEGLSLossless),
        ("j2k", JPEG2000Lossless),
    ):
        for what, frame in (("garbage", b"\xa5" * 4000), ("bytes", b"\0\0")):
            yield f"{name}-{what}", _image(str(syntax), PixelData=encapsulate([frame]))
            large = {"Rows": 65535, "Columns": 65535}
            yield f"{name}-{what}-65535", _image(str(syntax), PixelData=encapsulate([frame]), **large)
        yield f"{name}-frames", _image(str(syntax), PixelData=encapsulate([b"\0\0"] * 50), NumberOfFrames=2**31 - 1)
    yield "rle-64mb", _image(str(RLELossless), PixelData=encapsulate([_rle_head()]), Rows=5000, Columns=5000)
    for size in (65535, 2**31 - 1, 2**32 - 1):
        yield f"j2k-head-{size}", _image(str(JPEG2000Lossless), PixelData=encapsulate([_jpeg2000(size, size)]))
    yield "functional-groups-deep", part10(_deep_functional_groups())
    for keyword, value in (
        ("InstanceNumber", b"abc "),
        ("NumberOfFrames", b"many"),
        ("Rows", b"\1\2\3\4\5\6"),
        ("PixelSpacing", b"one\\two\\three"),
        ("ImagePositionPatient", b"nan\\inf\\-inf "),
        ("RescaleSlope", b"1e999 "),
        ("BitsStored", b""),
    ):
        yield f"no-number-{keyword}", _with_raw(keyword, value)


def _rle_head() -> bytes:
    return struct.pack("<16I", 2, 64, 66, *[0] * 13) + b"\x81\x00\x81\x00"


def _place_first(element: bytes) -> bytes:
    """Return an image with `element`, of a group below the patient's, before it."""
    data = encoded(ct(1))
    at = data.index(b"\x10\x00\x10\x00")
    return data[:at] + element + data[at:]


def _deep_functional_groups() -> bytes:
    data = encoded(ct(1))
    at = data.index(b"\xe0\x7f\x10\x00")
    frame = b"\x00\x52\x30\x92SQ\0\0"
    inside = nested(5_000)
    return (
        data[:at]
        + frame
        + struct.pack("<I", len(inside) + 8)
        + b"\xfe\xff\x00\xe0"
        + struct.pack("<I", len(inside))
        + inside
        + data[at:]
    )


def _with_raw(keyword: str, value: bytes) -> bytes:
    """Return an image in which an element has these bytes, valid or not."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import RawDataElement
    from pydicom.tag import Tag

    dataset = Dataset()
    dataset.update(ct(1))
    tag = Tag(tag_for_keyword(keyword) or 0)
    dataset._dict[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, False, True)  # type: ignore[index]
    buffer = BytesIO()
    with warnings.catch_warnings(action="ignore"):
        as_file(dataset).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def real() -> dict[str, bytes]:
    """Return real files by name."""
    return {name: Path(str(get_testdata_file(name))).read_bytes() for name in REAL}


def tampered(content: bytes, chance: random.Random) -> bytes:
    """Return a real file with a few bytes, lengths or parts changed; its prefix stays, so that it is read at all."""
    start = 132
    part = (
        mutated_dataset(content[start : start + 4096], chance)
        if chance.random() < 0.7
        else content[start : start + 4096]
    )
    rest = content[start + 4096 :]
    if rest and chance.random() < 0.4:
        rest = mutated_dataset(rest, chance)
    return content[:start] + part + rest


def cuts(content: bytes, step: int = 97) -> Iterator[bytes]:
    """Yield a file cut off at every 97th byte."""
    for end in range(0, len(content), step):
        yield content[:end]
