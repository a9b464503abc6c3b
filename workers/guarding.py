"""When an answer cannot be right: the manifest's guards, held against what a model says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from scipy import ndimage

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import Guard, Manifest
from workers.prediction import Grid, Prediction
from workers.quantities import Mask, volumes_by_value

_TOUCHING = np.ones((3, 3, 3), bool)
_ENDS = (0.5, 99.5)  # percentiles that are taken for black and white
_SIGNAL = 0.15  # of the way from black to white: darker is air, or bone in MR


def guarded(prediction: Prediction, grid: Grid, manifest: Manifest) -> Prediction:
    """Return the prediction, partial where a structure is cut off; raise NotApplicable where it cannot be right.

    Raises:
        NotApplicable: a guarded segment is too small or large, in too many pieces, cut off, or the model is unsure.
    """
    missing: list[str] = []
    for value, guard in manifest.guards.items():
        label = manifest.outputs.segments[value].label
        for layer in () if prediction.labels is None else (prediction.labels, *prediction.overlapping):
            mask = layer == value
            if mask.any():
                missing += _judged(mask, guard, label, prediction.certainty.get(value), grid)
    return replace(prediction, incomplete=(*prediction.incomplete, *missing)) if missing else prediction


def _judged(mask: Mask, guard: Guard, label: str, certainty: float | None, grid: Grid) -> Iterator[str]:
    """Yield what of a structure is missing; raise NotApplicable where it cannot be one."""
    if grid.placed:
        millilitres = volumes_by_value(mask.astype(np.uint8), grid).get(1, 0.0) / 1000
        if millilitres not in guard.volume:
            allowed = f"{guard.volume.min:g} to {guard.volume.max:g} ml"
            raise NotApplicable(Reason.VOLUME_OUT_OF_RANGE, f"{label}: {millilitres:.0f} ml, plausible is {allowed}")
    if guard.components is not None or guard.largest_component > 0:
        _judge_pieces(mask, guard, label)
    if certainty is not None and certainty < guard.confidence:
        raise NotApplicable(
            Reason.UNSURE, f"{label}: mean probability {certainty:.2f}, at least {guard.confidence:.2f} is needed"
        )
    if guard.surroundings > 0 and (around := _around(mask, grid)) < guard.surroundings:
        raise NotApplicable(
            Reason.NOTHING_AROUND,
            f"{label}: tissue around it is {around:.0%} of its volume, at least {guard.surroundings:.0%} is plausible",
        )
    if guard.border != "allow" and (edges := _touched(mask)):
        if guard.border == "refuse":
            raise NotApplicable(Reason.CUT_OFF, f"{label} reaches the edge of the images ({', '.join(edges)})")
        yield f"{label} is cut off: {', '.join(edges)}"


def _judge_pieces(mask: Mask, guard: Guard, label: str) -> None:
    numbered, count = ndimage.label(mask, structure=_TOUCHING)
    largest = np.bincount(numbered.ravel())[1:].max() / mask.sum()
    if guard.components is not None and count > guard.components:
        raise NotApplicable(Reason.IN_PIECES, f"{label}: {count} pieces, plausible are {guard.components}")
    if largest < guard.largest_component:
        raise NotApplicable(
            Reason.IN_PIECES,
            f"{label}: {largest:.0%} in the largest piece, at least {guard.largest_component:.0%} is plausible",
        )


def _around(mask: Mask, grid: Grid) -> float:
    """Return how much is bright outside a mask, two voxels away from it at least, as a part of the mask."""
    low, high = np.percentile(grid.values[::2, ::2, ::2], _ENDS)
    bright = grid.values > low + _SIGNAL * (high - low)
    return float((bright & ~ndimage.binary_dilation(mask, iterations=2)).sum() / mask.sum())


_EDGES = (("below", "above"), ("in front", "behind"), ("right", "left"))  # first and last of k, j, i


def _touched(mask: Mask) -> list[str]:
    """Return at which edges of the images a mask ends."""
    return [
        name
        for axis, names in enumerate(_EDGES)
        for name, index in zip(names, (0, -1), strict=True)
        if np.take(mask, index, axis=axis).any()
    ]
