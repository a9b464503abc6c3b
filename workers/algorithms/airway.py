"""The trachea and the main bronchi, followed slice by slice from the neck down."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from workers.algorithms.morphology import Mask, ball_dilate

_LUMEN = -750.0  # HU; air in a tube of some width, at 2 mm
_TRACHEA = (50.0, 800.0)  # mm2, cross-section
_BRANCH = 700.0  # mm2, together, of what follows below
_GROWTH = 2.2  # a cross-section that grows more from slice to slice has leaked into the lung
_SHORTEST = 30.0  # mm that a trachea must be followed for
_WALL = 2.5  # mm


@dataclass(frozen=True, slots=True)
class _Region:
    label: int
    area: float
    centre: tuple[float, float]


def find_airway(
    values: npt.NDArray[np.float32], body: Mask, thickness: npt.NDArray[np.float64], spacing: tuple[float, float, float]
) -> Mask:
    """Return trachea and main bronchi with their walls, or nothing where no trachea is found.

    `values` are HU of shape (k, j, i), k to the head. From each slice of the upper half a round, central
    cross-section of air is followed downwards; the longest such chain is the trachea (after Hu, Hoffman and
    Reinhardt 2001). A branch that suddenly widens has leaked and ends.
    """
    lumen = (values < _LUMEN) & body
    best: Mask = np.zeros_like(lumen)
    longest = 0.0
    tried: set[tuple[int, int]] = set()
    for start in range(len(values) - 1, len(values) // 3, -1):
        for region, labels in _tracheal(lumen[start], body[start], spacing):
            if (start, region.label) in tried:
                continue
            followed = _follow(lumen, start, labels == region.label, spacing)
            length = float(thickness[followed.any(axis=(1, 2))].sum())
            if length > longest * 1.25:
                best, longest = followed, length
        if longest >= 3 * _SHORTEST:
            break
    if longest < _SHORTEST:
        return np.zeros_like(lumen)
    return ball_dilate(best, _WALL, spacing) & body


def _tracheal(
    plane: Mask, body: Mask, spacing: tuple[float, float, float]
) -> list[tuple[_Region, npt.NDArray[np.int32]]]:
    """Return the cross-sections of a slice that may be a trachea: right size, round, near the middle of the body."""
    columns = np.flatnonzero(body.any(axis=0))
    if not len(columns):
        return []
    middle, width = columns.mean(), float(np.ptp(columns)) + 1
    labels, _number = ndimage.label(plane)
    pixel = spacing[1] * spacing[2]
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels[box] == label
        area = float(region.sum()) * pixel
        if not _TRACHEA[0] <= area <= _TRACHEA[1]:
            continue
        height_mm, width_mm = region.shape[0] * spacing[1], region.shape[1] * spacing[2]
        fills = area / (height_mm * width_mm)
        centre = (box[0].start + box[0].stop) / 2, (box[1].start + box[1].stop) / 2
        if fills > 0.5 and 0.4 < height_mm / width_mm < 2.5 and abs(centre[1] - middle) < 0.15 * width:
            found.append((_Region(label, area, centre), labels))
    return found


def _follow(lumen: Mask, start: int, region: Mask, spacing: tuple[float, float, float]) -> Mask:
    """Follow a cross-section downwards, through its branching, until it ends or leaks."""
    followed = np.zeros_like(lumen)
    followed[start] = region
    pixel = spacing[1] * spacing[2]
    previous = region
    for k in range(start - 1, -1, -1):
        labels, _number = ndimage.label(lumen[k])
        touched = np.unique(labels[ndimage.binary_dilation(previous)])
        here = np.zeros_like(previous)
        for label in touched[touched > 0]:
            candidate = labels == label
            overlapped = previous & ndimage.binary_dilation(candidate, iterations=2)
            limit = max(_GROWTH * float(overlapped.sum()) * pixel, 60.0)
            if float(candidate.sum()) * pixel <= min(limit, _BRANCH):
                here |= candidate
        if not here.any() or float(here.sum()) * pixel > _BRANCH:
            break
        followed[k] = here
        previous = here
    return followed
