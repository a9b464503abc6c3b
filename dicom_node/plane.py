"""Between the coordinates of an image and those of the patient (PS3.3 C.7.6.2.1.1).

An image's coordinates are (column, row), in pixels, from the corner of its first pixel; Image Position (Patient) is
the centre of that pixel, half a pixel further.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydicom import Dataset


def in_patient(points: npt.NDArray[np.floating], header: Dataset) -> npt.NDArray[np.float64]:
    """Return points of an image, shape `(points, 2)`, as patient coordinates, mm, shape `(points, 3)`."""
    origin, along_rows, along_columns = _axes(header)
    centred = points.astype(np.float64) - 0.5
    return np.asarray(origin + centred[:, :1] * along_rows + centred[:, 1:] * along_columns)


def in_image(points: npt.NDArray[np.floating], header: Dataset) -> npt.NDArray[np.float64]:
    """Return patient coordinates, mm, shape `(points, 3)`, as (column, row, mm off the plane), shape `(points, 3)`."""
    origin, along_rows, along_columns = _axes(header)
    normal = np.cross(along_rows, along_columns)
    axes = np.stack([along_rows, along_columns, normal / np.linalg.norm(normal)], axis=1)
    solved = np.linalg.solve(axes, (points.astype(np.float64) - origin).T).T
    return np.asarray(solved + np.array([0.5, 0.5, 0.0]))


def _axes(header: Dataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the centre of the first pixel and the ways to the next in its row and in its column, mm."""
    orientation = np.array([float(value) for value in header.ImageOrientationPatient])
    origin = np.array([float(value) for value in header.ImagePositionPatient])
    between_rows, between_columns = (float(value) for value in header.PixelSpacing)
    return origin, orientation[:3] * between_columns, orientation[3:] * between_rows
