"""Files of one series become a Source: headers in the order of their places, pixels decoded when they are asked for."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import JPEGExtended12Bit

from dicom_node.errors import InputRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.source import Source, SourceFrame

_LONGEST = 120.0  # seconds for one file


def read_source(paths: Sequence[Path]) -> Source:
    """Read the images of one series: every frame of every instance, by position, else by Instance Number.

    Raises:
        InputRefused: a file cannot be read, or the files are of more than one series.
    """
    headers = sorted(((_header(path), path) for path in paths), key=lambda pair: _rank(pair[0]))
    if len({str(header.get("SeriesInstanceUID")) for header, _ in headers}) != 1:
        raise InputRefused("the files are not those of one series")
    frames = tuple(
        SourceFrame(instance, number)
        for instance, (header, _) in enumerate(headers)
        for number in range(1, int(header.get("NumberOfFrames") or 1) + 1)
    )
    return source_of([header for header, _ in headers], [path for _, path in headers], frames)


def source_of(headers: Iterable[Dataset], paths: Iterable[Path], frames: Iterable[SourceFrame]) -> Source:
    """Return a source whose pixels come from `paths`, the files of `headers` in the same order."""
    datasets, files, places = tuple(headers), tuple(paths), tuple(frames)

    def pixels(frame: int) -> npt.NDArray[Any]:
        place = places[frame]
        header = datasets[place.instance]
        (stored,) = decoded(files[place.instance], header, [place.frame_number - 1])
        if str(header.get("PhotometricInterpretation")) == "PALETTE COLOR":
            coloured = apply_color_lut(stored, header)
            return coloured if coloured.dtype == np.uint8 else (coloured >> 8).astype(np.uint8)
        return stored

    return Source(datasets, places, pixels)


def decoded(path: Path, header: Dataset, indices: list[int]) -> list[npt.NDArray[Any]]:
    """Return the stored values of some frames (numbered from 0); colour comes as RGB.

    Raises:
        NotApplicable: there is no pixel data.
        InputRefused: no decoder here can decode it.
    """
    try:
        if _is_extended_jpeg(header):
            return _by_dcmtk(path, indices)
        return list(iter_pixels(path, indices=indices))
    except InputRefused:
        raise
    except Exception as error:
        # decoders of several libraries stand behind this, each with exceptions of its own
        if not _has_pixels(path):
            raise NotApplicable(Reason.NO_PIXEL_DATA, "an image has no pixel data") from error
        syntax = header.file_meta.get("TransferSyntaxUID")
        name = syntax.name if syntax else "no stated transfer syntax"
        raise InputRefused(f"pixels in {name} cannot be decoded here: {type(error).__name__}") from error


def _is_extended_jpeg(header: Dataset) -> bool:
    """Return whether pixels are in JPEG of 12 bits, which no decoder among the node's libraries knows."""
    return header.file_meta.get("TransferSyntaxUID") == JPEGExtended12Bit and int(header.get("BitsStored") or 8) > 8


def _by_dcmtk(path: Path, indices: list[int]) -> list[npt.NDArray[Any]]:
    """Return frames as DCMTK decodes them; raise InputRefused where it is not installed, or cannot."""
    program = shutil.which("dcmdjpeg")
    if program is None:
        raise InputRefused(f"pixels in {JPEGExtended12Bit.name} of 12 bits need dcmdjpeg: apt-get install dcmtk")
    with tempfile.TemporaryDirectory(prefix="dicom-node-") as folder:  # of mode 0700
        plain = Path(folder) / "plain.dcm"
        command = [program, "--quiet", "--conv-never", str(path), str(plain)]
        done = subprocess.run(command, capture_output=True, timeout=_LONGEST, check=False)  # noqa: S603 - no shell
        if done.returncode != 0 or not plain.is_file():
            raise InputRefused(f"pixels in {JPEGExtended12Bit.name} cannot be decoded by dcmdjpeg")
        return list(iter_pixels(plain, indices=indices))


def _has_pixels(path: Path) -> bool:
    keywords = ["PixelData", "FloatPixelData", "DoubleFloatPixelData"]
    read = dcmread(path, specific_tags=list(keywords), defer_size=1024)
    return any(keyword in read for keyword in keywords)


def _header(path: Path) -> Dataset:
    try:
        return dcmread(path, stop_before_pixels=True)
    except Exception as error:
        # pydicom answers a broken file with whatever exception comes first
        raise InputRefused(f"an instance cannot be read: {type(error).__name__}") from error


def _rank(header: Dataset) -> tuple[float, int, str]:
    """Return what to sort by: the distance along the slices' normal, the Instance Number, the UID."""
    try:
        orientation = [float(value) for value in header.ImageOrientationPatient]
        normal = np.cross(orientation[:3], orientation[3:])
        along = float(np.array([float(value) for value in header.ImagePositionPatient]) @ normal)
    except Exception:
        # absent, or of no kind at all: pydicom converts on access, with an exception of its own for each
        along = 0.0
    return along, int(header.get("InstanceNumber") or 0), str(header.get("SOPInstanceUID"))
