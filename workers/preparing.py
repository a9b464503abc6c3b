"""A grid becomes the array that a network was trained on, and what the network says comes back onto the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from dicom_node.manifest import InputSlot, Intensity
from workers.lattice import Frame, box_on_grid, frame_of, labels_on_grid, on_frame, values_on_grid
from workers.prediction import Grid

Scalar = TypeVar("Scalar", bound=np.generic)

_CANONICAL = "SPL"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What goes into a network, and the way back.

    `array` is float32 of shape `(channels, *axes)`, the axes as the manifest's `axes` names them. `frame` is None
    where nothing was resampled. `order[n]` is the canonical axis that network axis n is, `flipped[n]` whether it
    runs the other way.
    """

    array: Array
    grid: Grid
    frame: Frame | None
    order: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    def labels_back(self, labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return label values over the network's array on the grid; where resampled, the likeliest of each voxel."""
        canonical = _from_network(labels, self.order, self.flipped)
        if self.frame is None:
            return np.ascontiguousarray(canonical)
        return labels_on_grid(canonical, self.frame, self.grid)

    def values_back(self, values: Array) -> Array:
        """Return probabilities over the network's array on the grid."""
        canonical = _from_network(values, self.order, self.flipped)
        if self.frame is None:
            return np.ascontiguousarray(canonical)
        return values_on_grid(canonical, self.frame, self.grid)

    def edges_back(self, edges: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Return a box, least and greatest edge for each network axis, as one over the grid's axes (k, j, i).

        Edges are in voxels: 0 is the near edge of the first voxel, 1 its far edge.
        """
        shape = self.array.shape[1:]
        box = [(0.0, 0.0)] * 3
        for axis, ((low, high), flip) in enumerate(zip(edges, self.flipped, strict=True)):
            size = shape[axis]
            box[self.order[axis]] = (size - high, size - low) if flip else (low, high)
        if self.frame is None:
            return box
        return box_on_grid(box, self.frame, self.grid)


def prepare(grid: Grid, slots: Sequence[tuple[str, InputSlot]]) -> Prepared:
    """Return the network's input: one channel for each slot (three for colour), in the first slot's lattice."""
    first = slots[0][1]
    order, flipped = _order(first.axes) if grid.placed else ((0, 1, 2), (False, False, False))
    frame = frame_of(grid, first, order)
    channels = []
    for number, (name, slot) in enumerate(slots):
        values = grid.values if number == 0 else grid.others[name]
        for channel in _channels(values):
            canonical = channel.astype(np.float32) if frame is None else on_frame(channel, grid, frame)
            scaled(canonical, slot.intensities.get(grid.modality, slot.intensity))
            channels.append(_to_network(canonical, order, flipped))
    return Prepared(np.ascontiguousarray(np.stack(channels)), grid, frame, order, flipped)


# -- intensities --------------------------------------------------------------------------------------------------


def scaled(values: Array, how: Intensity) -> None:
    """Bring `values` into the range of the training, in place."""
    if how.clip is not None:
        np.clip(values, *how.clip, out=values)
    if how.clip_percentiles is not None:
        chosen = _chosen(values, how)
        if chosen.size:
            low, high = np.percentile(chosen, how.clip_percentiles)
            np.clip(values, low, high, out=values)
    if how.scale == "range":
        low, high = how.clip if how.clip is not None and how.clip_percentiles is None else (values.min(), values.max())
        values -= np.float32(low)
        values *= np.float32((how.to[1] - how.to[0]) / max(float(high) - float(low), 1e-6))
        values += np.float32(how.to[0])
    elif how.scale == "zscore":
        chosen = _chosen(values, how)
        mean = how.mean if how.mean is not None else float(chosen.mean(dtype=np.float64)) if chosen.size else 0.0
        std = how.std if how.std is not None else float(chosen.std(dtype=np.float64)) if chosen.size else 1.0
        values -= np.float32(mean)
        values /= np.float32(max(std, 1e-6))


def _chosen(values: Array, how: Intensity) -> Array:
    return values[values > 0] if how.over == "positive" else values


def _channels(values: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
    return [values] if values.ndim == 3 else [values[..., channel] for channel in range(values.shape[3])]


# -- axes ---------------------------------------------------------------------------------------------------------


def _order(axes: str) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Return for each network axis the canonical axis that it is, and whether it runs the other way."""
    opposite = dict(zip("SPLIAR", "IARSPL", strict=True))
    order = [next(n for n, own in enumerate(_CANONICAL) if letter in (own, opposite[own])) for letter in axes]
    flipped = [letter not in _CANONICAL for letter in axes]
    return (order[0], order[1], order[2]), (flipped[0], flipped[1], flipped[2])


def _to_network(
    values: npt.NDArray[np.float32], order: Sequence[int], flipped: Sequence[bool]
) -> npt.NDArray[np.float32]:
    return np.transpose(values, order)[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]


def _from_network(values: npt.NDArray[Scalar], order: Sequence[int], flipped: Sequence[bool]) -> npt.NDArray[Scalar]:
    turned = values[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]
    return np.transpose(turned, np.argsort(order))
