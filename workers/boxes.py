"""Where in a volume its labels are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Box = tuple[slice, slice, slice]


def boxes_of(labels: npt.NDArray[np.unsignedinteger]) -> dict[int, Box]:
    """Return for each value but 0 of `labels`, of shape `(k, j, i)`, the box that it lies in, in ascending order.

    scipy's `find_objects` looks at every voxel; here it is every row's runs of one value, a tenth of the time for
    organs.
    """
    columns = labels.shape[2]
    values = int(np.iinfo(labels.dtype).max) + 1
    low = np.full((3, values), max(labels.shape))
    high = np.zeros((3, values), low.dtype)
    for number, plane in enumerate(labels):
        if not plane.any():
            continue
        value, start, after = _runs(plane)
        row, first = np.divmod(start, columns)
        low[0, value] = np.minimum(low[0, value], number)
        high[0, value] = number + 1
        for axis, begin, end in ((1, row, row + 1), (2, first, after - row * columns)):
            np.minimum.at(low[axis], value, begin)
            np.maximum.at(high[axis], value, end)
    found = np.flatnonzero(high[0])
    edges = zip(low[:, found].T.tolist(), high[:, found].T.tolist(), strict=True)
    return {
        value: (slice(k, k_after), slice(j, j_after), slice(i, i_after))
        for value, ((k, j, i), (k_after, j_after, i_after)) in zip(found.tolist(), edges, strict=True)
    }


def _runs(
    plane: npt.NDArray[np.unsignedinteger],
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the value of each run but those of 0, its first index, and that after its last; no run leaves a row."""
    flat = plane.ravel()
    is_start = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=is_start[1:])
    is_start[:: plane.shape[1]] = True
    start = np.flatnonzero(is_start)
    after = np.append(start[1:], flat.size)
    value = flat[start]
    is_there = value != 0
    return value[is_there], start[is_there], after[is_there]
