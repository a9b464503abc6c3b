"""Files of one series become a Source: headers in the order of their places, pixels decoded when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.pixels.processing import apply_color_lut

from dicom_node import rations
from dicom_node.decoders import stored_values, syntax_name
from dicom_node.errors import InputRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.source import Instance, Source, SourceFrame


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
        for number in range(1, max(1, int(header.get("NumberOfFrames") or 1)) + 1)
    )
    return source_of([header for header, _ in headers], [path for _, path in headers], frames)


def source_of(
    headers: Sequence[Dataset],
    paths: Iterable[Path],
    frames: Iterable[SourceFrame],
    known: tuple[Instance, ...] | None = None,
) -> Source:
    """Return a source whose pixels come from `paths`, the files of `headers` in the same order, as is `known`."""
    datasets, files, places = headers, tuple(paths), tuple(frames)

    def pixels(frame: int) -> npt.NDArray[Any]:
        place = places[frame]
        header = datasets[place.instance]
        (stored,) = decoded(files[place.instance], header, [place.frame_number - 1])
        if str(header.get("PhotometricInterpretation")) == "PALETTE COLOR":
            with rations.understood():
                coloured = apply_color_lut(stored, header)
            return coloured if coloured.dtype == np.uint8 else (coloured >> 8).astype(np.uint8)
        return stored

    return Source(datasets, places, pixels, known)


def decoded(path: Path, header: Dataset, indices: list[int]) -> list[npt.NDArray[Any]]:
    """Return the stored values of some frames (numbered from 0), each `(rows, columns)` or, as RGB, with a third axis.

    Raises:
        NotApplicable: there is no pixel data.
        InputRefused: no decoder here can decode it.
    """
    try:
        return stored_values(path, header, indices)
    except InputRefused:
        raise
    except Exception as error:
        # decoders of several libraries stand behind this, each with exceptions of its own
        if not _has_pixels(path):
            raise NotApplicable(Reason.NO_PIXEL_DATA, "an image has no pixel data") from error
        name = syntax_name(header)
        raise InputRefused(f"pixels in {name} cannot be decoded here: {type(error).__name__}") from error


def _has_pixels(path: Path) -> bool:
    """Return whether a file has pixel data; a file that ends too early had some."""
    keywords = ["PixelData", "FloatPixelData", "DoubleFloatPixelData"]
    try:
        read = rations.read(path, specific_tags=list(keywords), defer_size=1024)
    except Exception:
        return True  # what it is that cannot be read, the decoder has said already
    return any(keyword in read for keyword in keywords)


def _header(path: Path) -> Dataset:
    try:
        header = rations.read(path, stop_before_pixels=True)
        rations.require_plausible(header, path.stat().st_size)
        return header
    except InputRefused:
        raise
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
    return along, number_of(header), str(header.get("SOPInstanceUID"))


def number_of(header: Dataset) -> int:
    """Return the Instance Number; 0 where there is none, or none that is a number."""
    try:
        return int(header.get("InstanceNumber") or 0)
    except Exception:
        return 0
