"""What is measured of a mask, and the codes and units that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError

from dicom_node.findings import Code, Measurement
from workers.boxes import Box
from workers.prediction import Grid

Mask = npt.NDArray[np.bool_]

_VOLUME = Code("118565006", "SCT", "Volume")
_DIAMETER = Code("81827009", "SCT", "Diameter")
_LONG_AXIS = Code("103339001", "SCT", "Long axis")
_SHORT_AXIS = Code("103340004", "SCT", "Short axis")
_MEAN = Code("373098007", "SCT", "Mean")
_CUBIC_CENTIMETRE = Code("cm3", "UCUM", "cubic centimeter")
_MILLIMETRE = Code("mm", "UCUM", "mm")
_SIGNAL = {
    # what the values of an image are, by modality, and their unit
    "CT": (Code("112031", "DCM", "Attenuation Coefficient"), Code("[hnsf'U]", "UCUM", "Hounsfield unit")),
    "PT": (Code("126401", "DCM", "SUVbw"), Code("g/ml{SUVbw}", "UCUM", "Standardized Uptake Value body weight")),
    "MR": (Code("110852", "DCM", "MR signal intensity"), Code("1", "UCUM", "no units")),
}
_DETECTED = {"volume": (_VOLUME, _CUBIC_CENTIMETRE, 1e-3), "diameter": (_DIAMETER, _MILLIMETRE, 1.0)}  # from mm3, mm


@dataclass(frozen=True, slots=True)
class Extent:
    """The longest distance across a mask on one of the source's own images, and the longest at a right angle (mm)."""

    long_axis: float
    short_axis: float


def measured(names: Iterable[str], mask: Mask, box: Box, grid: Grid) -> tuple[Measurement, ...]:
    """Return the measurements `names` of a mask: `mask` is what of it lies in `box`, both over the grid (k, j, i).

    Frames without a place in the patient have no volume, and the mean only where a modality's values have a name.
    """
    made = (_MEASURES[name](mask, box, grid) for name in names)
    return tuple(measurement for measurement in made if measurement is not None)


def as_detected(measurements: Mapping[str, float]) -> tuple[Measurement, ...]:
    """Return what a model measured itself, keyed `volume` (mm3) and `diameter` (mm)."""
    return tuple(
        Measurement(name, rounded(measurements[kind] * factor), unit)
        for kind, (name, unit, factor) in _DETECTED.items()
        if kind in measurements
    )


def rounded(value: float) -> float:
    """Return four digits that count: a report promises no more."""
    return float(f"{value:.4g}")


def volumes_by_value(labels: npt.NDArray[np.unsignedinteger], grid: Grid) -> dict[int, float]:
    """Return the volume (mm3) of each value but 0, each plane counted with the thickness that it stands for."""
    in_plane = float(np.prod([value for axis, value in enumerate(grid.spacing) if axis != grid.stack]))
    planes = np.moveaxis(labels, grid.stack, 0)
    highest = int(labels.max(initial=0))
    sizes = np.zeros(highest + 1)
    for plane, thickness in zip(planes, grid.thickness, strict=True):
        sizes += np.bincount(plane.ravel(), minlength=highest + 1) * thickness * in_plane
    return {value: float(size) for value, size in enumerate(sizes) if value and size}


def volume_of(mask: Mask, box: Box, grid: Grid) -> float:
    """Return the volume (mm3) of a mask in a box of the grid."""
    in_plane = float(np.prod([value for axis, value in enumerate(grid.spacing) if axis != grid.stack]))
    others = tuple(axis for axis in range(3) if axis != grid.stack)
    return float(mask.sum(axis=others) @ grid.thickness[box[grid.stack]]) * in_plane


def extent_of(mask: Mask, grid: Grid) -> Extent:
    """Return how large a mask is on the image where its longest axis is longest (RECIST 1.1 measures so).

    Distances are between the outer corners of pixels.
    """
    first, second = (axis for axis in range(3) if axis != grid.stack)
    best = Extent(0.0, 0.0)
    for plane in np.moveaxis(mask, grid.stack, 0):
        if plane.any():
            corners = _corners(plane) * (grid.spacing[first], grid.spacing[second])
            best = max(best, _across(corners), key=lambda extent: extent.long_axis)
    return best


def _corners(plane: Mask) -> npt.NDArray[np.float64]:
    """Return the corners of the outermost pixels, `(n, 2)` in pixels."""
    rim = plane & ~ndimage.binary_erosion(plane)
    places = np.argwhere(rim).astype(float)
    points = np.concatenate([places + step for step in ((0, 0), (0, 1), (1, 0), (1, 1))])
    try:
        return np.asarray(points[ConvexHull(points).vertices])
    except QhullError:  # never with corners of a pixel, but a report is worth more than a hull
        return points


def _across(corners: npt.NDArray[np.float64]) -> Extent:
    ways = corners[:, None] - corners[None]
    distances = np.linalg.norm(ways, axis=-1)
    first, second = np.unravel_index(int(distances.argmax()), distances.shape)
    longest = float(distances[first, second])
    along = ways[first, second] / longest
    at_right_angle = corners @ np.array([-along[1], along[0]])
    return Extent(longest, float(np.ptp(at_right_angle)))


# -- one function for each name that a manifest may ask for -------------------------------------------------------


def _volume(mask: Mask, box: Box, grid: Grid) -> Measurement | None:
    if not grid.placed:
        return None
    return Measurement(_VOLUME, rounded(volume_of(mask, box, grid) * 1e-3), _CUBIC_CENTIMETRE)


def _long(mask: Mask, box: Box, grid: Grid) -> Measurement:
    return Measurement(_LONG_AXIS, rounded(extent_of(mask, grid).long_axis), _MILLIMETRE)


def _short(mask: Mask, box: Box, grid: Grid) -> Measurement:
    return Measurement(_SHORT_AXIS, rounded(extent_of(mask, grid).short_axis), _MILLIMETRE)


def _mean(mask: Mask, box: Box, grid: Grid) -> Measurement | None:
    if grid.modality not in _SIGNAL or grid.values.ndim != 3:
        return None
    name, unit = _SIGNAL[grid.modality]
    return Measurement(name, rounded(float(grid.values[box][mask].mean(dtype=np.float64))), unit, derivation=_MEAN)


_MEASURES: Mapping[str, Callable[[Mask, Box, Grid], Measurement | None]] = {
    "volume": _volume,
    "diameter": _long,
    "short_axis": _short,
    "mean": _mean,
}
