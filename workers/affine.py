"""Where a regular lattice lies in the patient, as the matrix that NIfTI and the libraries built on it use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dicom_node.manifest import InputSlot
from workers.prediction import Grid
from workers.preparing import Prepared

Matrix = npt.NDArray[np.float64]

_CANONICAL_AXIS = {"S": 0, "I": 0, "P": 1, "A": 1, "L": 2, "R": 2}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def regular(grid: Grid, slot: InputSlot) -> InputSlot:
    """Return a slot that asks for evenly spaced, unsheared voxels of the grid's own size, where it asks for none.

    A grid that is regular already is not resampled by it.
    """
    if slot.spacing is not None or not grid.placed:
        return slot
    first, second, third = (grid.spacing[_CANONICAL_AXIS[letter]] for letter in slot.axes)
    return slot.model_copy(update={"spacing": (first, second, third)})


def ras_affine(prepared: Prepared) -> Matrix:
    """Return the matrix from indices (i, j, k), the grid's axes turned round, to millimetres R, A, S."""
    grid, frame = prepared.grid, prepared.frame
    if frame is None:
        step, origin = np.array(grid.spacing), grid.origins[0]
    else:
        step, origin = np.array(frame.step), np.array(frame.start) @ grid.directions
    lps = np.eye(4)
    lps[:3, :3] = (grid.directions * step[:, None])[::-1].T
    lps[:3, 3] = origin
    return np.asarray(_LPS_TO_RAS @ lps)
