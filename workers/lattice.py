"""A regular lattice laid over a grid by true position: values onto it, labels, probabilities and boxes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.manifest import InputSlot
from workers.prediction import Grid

_SAME = 1e-3  # of a step: what is nearer than this needs no resampling
_ROUNDED = 0.02  # of a voxel: scanners round positions

Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Frame:
    """A regular lattice in the grid's own directions: for each canonical axis (k, j, i) start, step and count.

    `start` (mm) is the coordinate of the first voxel's centre along the grid's direction, `step` is in mm.
    """

    start: tuple[float, float, float]
    step: tuple[float, float, float]
    count: tuple[int, int, int]


def frame_of(grid: Grid, slot: InputSlot, order: Sequence[int]) -> Frame | None:
    """Return the lattice that a slot's spacing and shape ask for; None where the grid's own voxels are it.

    `order[n]` is the canonical axis of network axis n. Frames without a place keep their number and order.
    """
    if slot.spacing is None and slot.shape is None:
        return None
    axes = [_axis(grid, axis, slot, list(order).index(axis)) for axis in range(3)]
    start, step, count = zip(*axes, strict=True)
    frame = Frame(start, step, count)
    return None if _is_own(grid, frame) else frame


def _axis(grid: Grid, axis: int, slot: InputSlot, place: int) -> tuple[float, float, int]:
    """Return start, step and count of one canonical axis."""
    own, low, high = grid.spacing[axis], *_extent(grid, axis)
    if not grid.placed and axis == grid.stack:
        return 0.0, 1.0, grid.shape[axis]
    step = slot.spacing[place] if slot.spacing else own
    count = slot.shape[place] if slot.shape else max(round((high - low) / step), 1)
    if slot.shape and slot.fit == "resize":
        step = (high - low) / count
    start = (low + high) / 2 - (count - 1) / 2 * step
    if abs(step - own) < _SAME * own and _is_regular(grid):
        first = low + own / 2  # voxels fall on voxels: nothing is blurred by half of one
        start = first + round((start - first) / own) * own
    return start, step, count


def _extent(grid: Grid, axis: int) -> tuple[float, float]:
    """Return where a grid begins and ends on an axis (mm), with half a voxel at each end."""
    if axis == grid.stack:
        half = grid.thickness[[0, -1]] / 2
        return float(grid.positions[0] - half[0]), float(grid.positions[-1] + half[1])
    offsets = _offsets(grid, axis)
    margin = grid.spacing[axis] / 2
    last = (grid.shape[axis] - 1) * grid.spacing[axis]
    return float(offsets.min()) - margin, float(offsets.max()) + last + margin


def _offsets(grid: Grid, axis: int) -> npt.NDArray[np.float64]:
    """Return for each plane the coordinate (mm) of its first voxel along an axis."""
    return np.asarray(grid.origins @ grid.directions[axis])


def _is_regular(grid: Grid) -> bool:
    """Return whether planes are evenly spaced and none is shifted against another."""
    in_plane = [axis for axis in range(3) if axis != grid.stack]
    even = len(grid.positions) < 3 or np.ptp(np.diff(grid.positions)) < _ROUNDED * grid.spacing[grid.stack]
    return bool(even) and all(np.ptp(_offsets(grid, axis)) < _ROUNDED * grid.spacing[axis] for axis in in_plane)


def _is_own(grid: Grid, frame: Frame) -> bool:
    if frame.count != grid.shape or not _is_regular(grid):
        return False
    return all(
        abs(frame.step[axis] - grid.spacing[axis]) < _SAME * grid.spacing[axis]
        and abs(frame.start[axis] - (_extent(grid, axis)[0] + grid.spacing[axis] / 2)) < _SAME * grid.spacing[axis]
        for axis in range(3)
        if grid.placed or axis != grid.stack
    )


# -- onto the lattice ---------------------------------------------------------------------------------------------


def on_frame(values: npt.NDArray[np.generic], grid: Grid, frame: Frame) -> Array:
    """Return values of shape `(k, j, i)` over the grid on the lattice, linearly, each plane where it truly lies.

    Outside the grid is the lowest value there is: air, or no signal.
    """
    fill = np.float32(values.min())
    stack, (first, second) = grid.stack, _in_plane(grid)
    planes = np.moveaxis(values, stack, 0)
    moved = [
        _sampled(
            plane.astype(np.float32) - fill,
            _indices(frame, first, offset, grid.spacing[first]),
            _indices(frame, second, other, grid.spacing[second]),
        )
        for plane, offset, other in zip(planes, _offsets(grid, first), _offsets(grid, second), strict=True)
    ]
    made = np.zeros((frame.count[stack], *moved[0].shape), np.float32)
    for place, mixture in enumerate(_across(grid, frame)):
        for plane, weight in mixture:
            made[place] += np.float32(weight) * moved[plane]
    made += fill
    return np.moveaxis(made, 0, stack)


def _across(grid: Grid, frame: Frame) -> list[list[tuple[int, float]]]:
    """Return for each plane of the lattice which planes of the grid it is made of, and in what parts."""
    if not grid.placed:
        return [[(plane, 1.0)] for plane in range(frame.count[grid.stack])]
    positions, (low, high) = grid.positions, _extent(grid, grid.stack)
    mixtures: list[list[tuple[int, float]]] = []
    for place in range(frame.count[grid.stack]):
        at = frame.start[grid.stack] + place * frame.step[grid.stack]
        after = int(np.searchsorted(positions, at))
        if not low <= at <= high:
            mixtures.append([])
        elif after in (0, len(positions)):
            mixtures.append([(min(after, len(positions) - 1), 1.0)])
        else:
            part = float((at - positions[after - 1]) / (positions[after] - positions[after - 1]))
            mixtures.append([(after - 1, 1 - part), (after, part)])
    return mixtures


def _indices(frame: Frame, axis: int, offset: float, spacing: float) -> Indices:
    """Return for each place on the lattice the index into a plane of the grid whose first voxel is at `offset`."""
    return np.asarray((frame.start[axis] + np.arange(frame.count[axis]) * frame.step[axis] - offset) / spacing)


# -- back onto the grid -------------------------------------------------------------------------------------------


def values_on_grid(values: Array, frame: Frame, grid: Grid) -> Array:
    """Return values over the lattice, of shape `frame.count`, on the grid; 0 outside the lattice."""
    planes = np.moveaxis(values, grid.stack, 0)
    made = np.zeros((len(grid.positions), *(grid.shape[axis] for axis in _in_plane(grid))), np.float32)
    for plane, (mixture, rows, columns) in enumerate(_ways_back(grid, frame)):
        if mixture:
            made[plane] = _sampled(_mixed({place: planes[place] for place, _ in mixture}, mixture), rows, columns)
    return np.ascontiguousarray(np.moveaxis(made, 0, grid.stack))


def labels_on_grid(labels: npt.NDArray[np.uint8], frame: Frame, grid: Grid) -> npt.NDArray[np.uint8]:
    """Return label values over the lattice on the grid: of each voxel the likeliest by linear interpolation."""
    planes = np.moveaxis(labels, grid.stack, 0)
    made = np.zeros((len(grid.positions), *(grid.shape[axis] for axis in _in_plane(grid))), np.uint8)
    for plane, (mixture, rows, columns) in enumerate(_ways_back(grid, frame)):
        near = {place: planes[place] for place, _ in mixture}
        present = {value for one in near.values() for value in np.unique(one).tolist() if value}
        best, nothing = np.zeros(made.shape[1:], np.float32), np.ones(made.shape[1:], np.float32)
        for value in sorted(present):
            masks = {place: one == value for place, one in near.items()}
            likelihood = _sampled(_mixed(masks, mixture), rows, columns)
            wins = likelihood > best
            made[plane][wins] = value
            best[wins] = likelihood[wins]
            nothing -= likelihood
        made[plane][nothing >= best] = 0
    return np.ascontiguousarray(np.moveaxis(made, 0, grid.stack))


def _ways_back(grid: Grid, frame: Frame) -> list[tuple[list[tuple[int, float]], Indices, Indices]]:
    """Return for each plane of the grid the lattice's planes that make it, and the indices into them."""
    stack, (first, second) = grid.stack, _in_plane(grid)
    ways = []
    for plane in range(len(grid.positions)):
        at = float(plane) if not grid.placed else (grid.positions[plane] - frame.start[stack]) / frame.step[stack]
        rows = _indices_back(frame, first, _offsets(grid, first)[plane], grid)
        columns = _indices_back(frame, second, _offsets(grid, second)[plane], grid)
        ways.append((_neighbours(float(at), frame.count[stack]), rows, columns))
    return ways


def _indices_back(frame: Frame, axis: int, offset: float, grid: Grid) -> Indices:
    coordinates = offset + np.arange(grid.shape[axis]) * grid.spacing[axis]
    return np.asarray((coordinates - frame.start[axis]) / frame.step[axis])


def _neighbours(at: float, count: int) -> list[tuple[int, float]]:
    """Return the planes around an index and their parts; none beyond half a plane outside."""
    if not -0.5 <= at <= count - 0.5:
        return []
    at = min(max(at, 0.0), count - 1.0)
    below = min(int(at), count - 1)
    part = at - below
    return [(below, 1.0)] if part == 0 else [(below, 1 - part), (below + 1, part)]


def _mixed(planes: Mapping[int, npt.NDArray[Any]], mixture: Sequence[tuple[int, float]]) -> Array:
    return np.asarray(sum(np.float32(weight) * planes[place].astype(np.float32) for place, weight in mixture))


Edges = tuple[float, float]


def box_on_grid(box: Sequence[Edges], frame: Frame, grid: Grid) -> list[Edges]:
    """Return least and greatest edge on each axis of the lattice as edges on the grid's axes (k, j, i).

    Edges are in voxels: 0 is the near edge of the first voxel. With a tilted gantry the middle plane's place counts.
    """
    at = [
        (frame.start[axis] + (low - 0.5) * frame.step[axis], frame.start[axis] + (high - 0.5) * frame.step[axis])
        for axis, (low, high) in enumerate(box)
    ]
    made = [
        ((low - grid.origins[0] @ direction) / spacing + 0.5, (high - grid.origins[0] @ direction) / spacing + 0.5)
        for (low, high), direction, spacing in zip(at, grid.directions, grid.spacing, strict=True)
    ]
    stack = grid.stack
    if not grid.placed:
        made[stack] = box[stack]
        return made
    far = np.append(grid.positions - grid.thickness / 2, grid.positions[-1] + grid.thickness[-1] / 2)
    first, last = np.interp(at[stack], far, np.arange(len(far), dtype=float)).tolist()
    made[stack] = (first, last)
    middle = grid.origins[min(int((first + last) / 2), len(grid.positions) - 1)] - grid.origins[0]
    for axis in _in_plane(grid):
        shift = float(middle @ grid.directions[axis]) / grid.spacing[axis]
        made[axis] = (made[axis][0] - shift, made[axis][1] - shift)
    return made


# -- one plane ----------------------------------------------------------------------------------------------------


def _in_plane(grid: Grid) -> tuple[int, int]:
    first, second = (axis for axis in range(3) if axis != grid.stack)
    return first, second


def _sampled(plane: Array, rows: Indices, columns: Indices) -> Array:
    """Return a plane at the crossings of fractional row and column indices, linearly; 0 outside it."""
    return _along(_along(plane, rows, 0), columns, 1)


def _along(plane: Array, indices: Indices, axis: int) -> Array:
    size = plane.shape[axis]
    inside = (indices >= -0.5) & (indices <= size - 0.5)
    within = np.clip(indices, 0, size - 1)
    below = np.minimum(within.astype(np.intp), max(size - 2, 0))
    part = (within - below).astype(np.float32)
    shape = (-1, 1) if axis == 0 else (1, -1)
    low = (1 - part) * inside
    made = np.take(plane, below, axis=axis) * low.reshape(shape).astype(np.float32)
    if size > 1:
        made += np.take(plane, below + 1, axis=axis) * (part * inside).reshape(shape).astype(np.float32)
    return np.asarray(made)
