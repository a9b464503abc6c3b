"""Images without a place in the patient: projections, ultrasound, cine. Frames, as they were stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.pixels.processing import apply_modality_lut

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from dicom_node.images import number_of, source_of
from dicom_node.source import Source, SourceFrame, flat
from workers.prediction import Grid


def frames_of(paths: Sequence[Path], headers: Sequence[Dataset], pool: ThreadPoolExecutor) -> tuple[Source, Grid, str]:
    """Return all frames of a series in the order of their numbers, their grid, and what was left out.

    Grey values are inverted where MONOCHROME1 says that bright means little, and rescaled; colour is RGB. Where
    instances differ in size, those of the most frequent size are taken.

    Raises:
        NotApplicable: no instance has an image.
    """
    order = sorted(range(len(headers)), key=lambda number: _rank(headers[number]))
    sizes = Counter(_size(headers[number]) for number in order)
    sizes.pop((0, 0, 0), None)
    if not sizes:
        raise NotApplicable(Reason.NO_PIXEL_DATA, "no instance is an image")
    size = max(sizes, key=lambda one: sizes[one])
    used = [number for number in order if _size(headers[number]) == size]
    places = [
        SourceFrame(place, frame)
        for place, number in enumerate(used)
        for frame in range(1, max(1, int(headers[number].get("NumberOfFrames") or 1)) + 1)
    ]
    source = source_of([headers[number] for number in used], [paths[number] for number in used], places)
    pixels = source.pixels
    if pixels is None:
        raise NotApplicable(Reason.NO_PIXEL_DATA, "no instance is an image")
    values = np.stack(list(pool.map(lambda frame: _shown(pixels(frame), source.header_of(frame)), range(len(places)))))
    left_out = f"{len(order) - len(used)} images of another size left out" if len(used) < len(order) else ""
    return source, _grid(values, source.header_of(0)), left_out


def _rank(header: Dataset) -> tuple[int, str]:
    return number_of(header), str(header.get("SOPInstanceUID"))


def _size(header: Dataset) -> tuple[int, int, int]:
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    return (rows, columns, _samples(header)) if rows and columns else (0, 0, 0)


def _samples(header: Dataset) -> int:
    palette = header.get("PhotometricInterpretation") == "PALETTE COLOR"
    return 3 if palette else int(header.get("SamplesPerPixel") or 1)


def _shown(stored: npt.NDArray[Any], header: Dataset) -> npt.NDArray[Any]:
    """Return what a frame's values mean: colour as it is, grey after its Modality LUT (PS3.3 C.11.1)."""
    if stored.ndim == 3:
        return stored
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        # by the range that pixels may have, so that frames of one series stay comparable
        stored = (-1 if header.get("PixelRepresentation") else (1 << int(header.BitsStored)) - 1) - stored.astype(int)
    return np.asarray(apply_modality_lut(stored, header), np.float32)


def _grid(values: npt.NDArray[Any], header: Dataset) -> Grid:
    count = len(values)
    down, across = _spacing(header)
    return Grid(
        values=values,
        spacing=(1.0, down, across),
        stack=0,
        positions=np.arange(count, dtype=float),
        thickness=np.ones(count),
        directions=np.eye(3),
        origins=np.zeros((count, 3)),
        placed=False,
        modality=str(header.get("Modality") or ""),
    )


def _spacing(header: Dataset) -> tuple[float, float]:
    """Return mm between rows and columns; on the detector where nothing nearer is known, 1.0 where nothing is."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        value = header.get(keyword)
        if value and len(value) == 2 and min(float(one) for one in value) > 0:
            return float(value[0]), float(value[1])
    return 1.0, 1.0


def is_flat(headers: Sequence[Dataset]) -> bool:
    """Return whether no image of a series has a place in the patient."""
    return not any("ImagePositionPatient" in flat(header, 1) for header in headers)
