"""Another series of the same patient on the grid of the first, by true position."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from workers.prediction import Grid

Array = npt.NDArray[np.float32]


def aligned(other: Grid, onto: Grid) -> Array:
    """Return the values of `other` at the voxels of `onto`, linearly; outside is the lowest value of `other`.

    The result has the shape of `onto`, `(k, j, i)`. Both must be of one frame of reference: see `require_one_frame`.
    """
    fill = float(other.values.min())
    made = np.empty(onto.shape, np.float32)
    planes = np.moveaxis(made, onto.stack, 0)
    first, second = (axis for axis in range(3) if axis != onto.stack)
    rows = np.arange(onto.shape[first])[:, None, None] * onto.spacing[first] * onto.directions[first]
    columns = np.arange(onto.shape[second])[None, :, None] * onto.spacing[second] * onto.directions[second]
    in_plane = rows + columns
    for number, plane in enumerate(planes):
        indices, inside = _indices(other, onto.origins[number] + in_plane)
        values = ndimage.map_coordinates(other.values, indices, output=np.float32, order=1, mode="nearest")
        plane[...] = np.where(inside, values, fill)
    return made


def _indices(grid: Grid, points: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the fractional indices `(3, ...)` of points `(..., 3)` in mm, and which lie within the grid.

    Between two planes the place of the first voxel is interpolated as the values are: exact with a tilted gantry.
    """
    along = points @ grid.directions[grid.stack]
    numbers = np.arange(len(grid.positions), dtype=float)
    plane = np.interp(along, grid.positions, numbers)
    low = grid.positions[0] - grid.thickness[0] / 2
    inside = (along >= low) & (along <= grid.positions[-1] + grid.thickness[-1] / 2)
    made = np.empty((3, *along.shape))
    made[grid.stack] = plane
    for axis in (axis for axis in range(3) if axis != grid.stack):
        offsets = np.interp(plane, numbers, grid.origins @ grid.directions[axis])
        made[axis] = (points @ grid.directions[axis] - offsets) / grid.spacing[axis]
        inside &= (made[axis] >= -0.5) & (made[axis] <= grid.shape[axis] - 0.5)
    return made, inside


def require_one_frame(first: str, other: str) -> None:
    """Raise NotApplicable where two Frame of Reference UIDs differ: nothing says where one lies in the other."""
    if not first or first != other:
        raise NotApplicable(Reason.OTHER_FRAME_OF_REFERENCE, "the series of the model's inputs are not in one frame")
