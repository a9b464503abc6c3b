"""Stored values of frames: by pydicom's decoders and imagecodecs', by DCMTK for JPEG none knows, or unpacked here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_fragments, get_frame, parse_basic_offsets, parse_fragments
from pydicom.pixels.utils import get_expected_length, iter_pixels
from pydicom.uid import (
    UID,
    ExplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    SecondaryCaptureImageStorage,
)

from dicom_node import codecs, rations
from dicom_node.errors import InputRefused

_LONGEST = 120.0  # seconds for one call of DCMTK
_PROGRESSIVE = ("1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55")  # retired, still in archives
_NEWER: Mapping[str, str] = {  # than pydicom's dictionary
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
    "1.2.840.10008.1.2.1.98": "Encapsulated Uncompressed Explicit VR Little Endian",
}
_PIXEL_DATA_HEAD = 12  # bytes: tag, VR and length of an encapsulated value
_DESCRIPTION = (
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
)


def syntax_name(header: Dataset) -> str:
    """Return the name of the transfer syntax that a file's header states."""
    syntax = _syntax(header)
    return _NEWER.get(syntax, syntax.name) if syntax else "no stated transfer syntax"


def stored_values(path: Path, header: Dataset, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
    """Return the stored values of frames (numbered from 0), in the order of `indices`; YCbCr has become RGB.

    Raises:
        InputRefused: there are fewer frames, or DCMTK is needed and is not installed, or cannot decode them.
        Exception: whatever pydicom's decoders raise.
    """
    frames = _decoder(header)(path, header, indices)
    if len(frames) != len(indices):
        raise InputRefused(f"pixels in {syntax_name(header)} are of fewer frames than the header says")
    return frames


def values_of(frames: Sequence[bytes], header: Dataset) -> list[npt.NDArray[Any]] | None:
    """Return the stored values of compressed frames that are plausible; other threads run meanwhile.

    None where that takes a decoder that keeps the interpreter, or another to know what is wrong.
    """
    if not _has_codec(header):
        return None
    try:
        return [np.asarray(each) for each in iter_pixels(_excerpt(header, frames), decoding_plugin=codecs.PLUGIN)]
    except Exception:
        return None  # each library has exceptions of its own; what is wrong with a frame the next one says


def lets_others_run(header: Dataset) -> bool:
    """Return whether other threads run while frames are decoded."""
    return _needs_dcmtk(header) or _has_codec(header)


def meaning_of_words(header: Dataset) -> npt.NDArray[Any]:
    """Return the stored value that each word of uncompressed pixel data of one sample stands for, as pydicom has it.

    The index is the word, little-endian and unsigned: 256 values where 8 bits are allocated, 65536 where 16 are.
    """
    words = np.arange(1 << int(header.BitsAllocated), dtype=f"<u{int(header.BitsAllocated) // 8}")
    made = _described(header, ExplicitVRLittleEndian)
    made.Rows, made.Columns = len(words) // 16, 16
    made.PixelData = words.tobytes()
    made["PixelData"].VR = "OW" if made.BitsAllocated > 8 else "OB"
    (values,) = iter_pixels(made)
    return np.array(values).reshape(-1)


def _syntax(header: Dataset) -> UID:
    return UID(str(getattr(header, "file_meta", {}).get("TransferSyntaxUID") or ""))


def _decoder(header: Dataset) -> Callable[[Path, Dataset, Sequence[int]], list[npt.NDArray[Any]]]:
    if _syntax(header) in _PACKED:
        return _by_unpacking
    return _by_dcmtk if _needs_dcmtk(header) else _by_pydicom


def _by_pydicom(path: Path, header: Dataset, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
    syntax = _syntax(header)
    if syntax in rations.DEFLATED:
        return [np.asarray(frame) for frame in iter_pixels(rations.read(path), indices=list(indices))]
    if syntax.is_transfer_syntax and syntax.is_encapsulated:
        frames = compressed_frames(path, header, indices)  # decoders make room for what a frame says of itself
        if (values := values_of(frames, header)) is not None:
            return values
    return [np.asarray(frame) for frame in iter_pixels(path, indices=list(indices))]


def _has_codec(header: Dataset) -> bool:
    return codecs.decodes(_syntax(header), int(header.get("SamplesPerPixel") or 1))


# -- DCMTK --------------------------------------------------------------------------------------------------------


def _needs_dcmtk(header: Dataset) -> bool:
    """Return whether pixels are in JPEG that no decoder among the node's libraries knows: 12 bits, or progressive."""
    syntax = _syntax(header)
    return syntax in _PROGRESSIVE or (syntax == JPEGExtended12Bit and int(header.get("BitsStored") or 8) > 8)


def _by_dcmtk(path: Path, header: Dataset, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
    """Return frames as dcmdjpeg decodes them, from a file that has these frames and nothing of the patient."""
    program = _dcmdjpeg()
    if program is None:
        raise InputRefused(
            f"pixels in {syntax_name(header)} of {header.get('BitsStored')} bits need DCMTK's dcmdjpeg: "
            "apt-get install dcmtk"
        )
    excerpt = _excerpt(header, compressed_frames(path, header, indices))
    with tempfile.TemporaryDirectory(prefix="dicom-node-") as folder:  # of mode 0700
        packed, plain = Path(folder) / "packed.dcm", Path(folder) / "plain.dcm"
        for file in (packed, plain):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o600))
        excerpt.save_as(packed, enforce_file_format=True)
        _run([program, "--quiet", "--conv-never", str(packed), str(plain)], syntax_name(header))
        return [np.array(frame) for frame in iter_pixels(plain)]


def _run(command: Sequence[str], name: str) -> None:
    try:
        done = subprocess.run(  # noqa: S603 - no shell, and no word of the command is from outside
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        raise InputRefused(f"pixels in {name} took dcmdjpeg more than {_LONGEST:.0f} s") from None
    if done.returncode != 0:
        raise InputRefused(f"pixels in {name} cannot be decoded by dcmdjpeg: damaged, or not what they say")


def _dcmdjpeg() -> str | None:
    """Return DCMTK's program: never a script of that name that came with some Python package."""
    scripts = Path(sysconfig.get_path("scripts")).resolve()
    folders = [folder for folder in os.get_exec_path() if folder and Path(folder).resolve() != scripts]
    return shutil.which("dcmdjpeg", path=os.pathsep.join(folders))


# -- frames that are only packed ----------------------------------------------------------------------------------


def _inflated(frame: bytes, length: int) -> bytes:
    """Return at most `length` bytes of a deflated frame (PS3.5 A.4.13): it is never let grow beyond its image."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(frame, length)


def _bare(frame: bytes, length: int) -> bytes:
    """Return a frame that is encapsulated and nothing else (PS3.5 A.4.11), without its padding."""
    return frame[:length]


_PACKED: Mapping[str, Callable[[bytes, int], bytes]] = {
    "1.2.840.10008.1.2.8.1": _inflated,
    "1.2.840.10008.1.2.1.98": _bare,
}


def _by_unpacking(path: Path, header: Dataset, indices: Sequence[int]) -> list[npt.NDArray[Any]]:
    unpack = _PACKED[_syntax(header)]
    made = _described(header, ExplicitVRLittleEndian)
    length = get_expected_length(made)
    values = []
    for frame in compressed_frames(path, header, indices):
        plain = unpack(frame, length)
        if len(plain) < length:
            raise InputRefused(f"pixels in {syntax_name(header)} cannot be decoded: a frame ends too early")
        made.PixelData = plain + b"\0" * (length % 2)
        made["PixelData"].VR = "OW" if made.BitsAllocated > 8 else "OB"
        values += [np.array(frame) for frame in iter_pixels(made)]
    return values


# -- frames of a file ---------------------------------------------------------------------------------------------


def compressed_frames(path: Path, header: Dataset, indices: Sequence[int]) -> list[bytes]:
    """Return some of a file's encapsulated frames as they are; nothing else of its pixels is read.

    Raises:
        InputRefused: a frame says that it is larger than its image, or ends too early for its decoder to find out.
    """
    tables = ["ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
    count = int(header.get("NumberOfFrames") or 1)
    with path.open("rb") as file:
        rationed = cast(BinaryIO, rations.Rationed(file))
        before = dcmread(rationed, stop_before_pixels=True, specific_tags=list(tables))
        offsets = tuple(before[table].value for table in tables) if tables[0] in before else None
        file.seek(_PIXEL_DATA_HEAD, os.SEEK_CUR)
        start = file.tell()
        places = _places(file, count) if offsets is None and count > 1 else []
        frames = []
        for index in indices:
            file.seek(places[index] if places else start)
            if places:
                frames.append(next(generate_fragments(file)))
            else:
                frames.append(get_frame(file, index, number_of_frames=count, extended_offsets=offsets))
    for frame in frames:
        require_plausible_frame(frame, header)
    return frames


def _places(file: BinaryIO, count: int) -> list[int]:
    """Return where in a file each frame is whose pixel data begin here and have no table that says so (PS3.5 A.4).

    Empty where there is a table, or frames may be of several fragments. `get_frame` walks to every frame anew.
    """
    if parse_basic_offsets(file):
        return []
    number, places = parse_fragments(file)
    return places if number == count else []


def require_plausible_frame(frame: bytes, header: Dataset) -> None:
    """Raise InputRefused where a frame would cost its decoder more than its image can: decoders believe what it says.

    CharLS takes ten seconds to find that a frame of JPEG-LS ends too early.
    """
    rations.require_no_larger(frame, int(header.get("Rows") or 0) * int(header.get("Columns") or 0))
    if _syntax(header) in JPEGLSTransferSyntaxes and not codecs.has_end(frame):
        raise InputRefused(f"pixels in {syntax_name(header)} cannot be decoded: a frame ends too early")


def _excerpt(header: Dataset, frames: Sequence[bytes]) -> Dataset:
    """Return a data set of compressed frames that has nothing of the patient."""
    made = _described(header, _syntax(header))
    made.NumberOfFrames = len(frames)
    made.PixelData = encapsulate(list(frames))
    made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    return made


def _described(header: Dataset, syntax: str) -> Dataset:
    """Return a data set of one frame, without its pixels: what describes them, and no other element."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = UID(syntax)
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    for keyword in _DESCRIPTION:
        if keyword in header:
            setattr(made, keyword, header[keyword].value)
    made.NumberOfFrames = 1
    return made
