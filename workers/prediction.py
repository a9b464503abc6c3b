"""What goes into a model and what comes out of it, in the model's own canonical voxel grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Grid:
    """Voxels in canonical patient order: axis 0 runs to the head, axis 1 to the back, axis 2 to the left.

    Index (k, j, i) therefore grows towards S(uperior), P(osterior), L(eft): the patient's right side has the
    small i. Oblique and tilted series keep their own axes; each is named after the patient axis nearest to it.

    `values` has shape `(k, j, i)`, float32 or int16, in the modality's rescaled units (HU for CT).
    `stack` is the axis that crosses the source's slices (0 for an axial CT). Slices may be unevenly spaced
    and, with a tilted gantry, shifted against each other, so each has its own place: `origins`, shape
    `(planes, 3)`, is the patient coordinate (mm; x to the left, y to the back, z to the head) of the centre
    of the first voxel of each plane, and `positions` (mm, strictly increasing) its distance along the plane's
    normal. `thickness` (mm) is the part of the stack axis that each plane stands for, which is what a volume
    must be computed with. `spacing` is `(k, j, i)` in mm, on the stack axis the median gap.
    `directions` are the three unit vectors (k, j, i) in patient coordinates.

    Frames without a place in the patient (projections, ultrasound, cine) are a grid that is not `placed`: axis 0
    counts frames, axes 1 and 2 are rows and columns as stored, spacing is 1.0 where none is known, and nothing says
    where right is. Colour has shape `(k, j, i, 3)`, RGB. `others` are the further series that a model takes, by
    the name of their slot, resampled onto this grid (shape `(k, j, i)`, float32).
    """

    values: npt.NDArray[np.float32] | npt.NDArray[np.int16]
    spacing: tuple[float, float, float]
    stack: int
    positions: npt.NDArray[np.float64]
    thickness: npt.NDArray[np.float64]
    directions: npt.NDArray[np.float64]
    origins: npt.NDArray[np.float64]
    placed: bool = True
    modality: str = ""
    others: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the number of voxels on each axis."""
        k, j, i = self.values.shape[:3]
        return k, j, i


@dataclass(frozen=True, slots=True)
class Detection:
    """One thing a model found: half-open voxel box `((k0, k1), (j0, j1), (i0, i1))`, centre and key plane.

    `name` is a key of the manifest's `outputs.detections`; `value` is the voxel value of its outline in
    `Prediction.instances`; numbers in `measurements` are keyed `volume` (mm3), `diameter` (mm).
    """

    name: str
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    centre: tuple[float, float, float]  # voxel coordinates (k, j, i)
    confidence: float  # 0..1
    value: int | None = None
    laterality: str | None = None  # "left" | "right"
    measurements: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says about a grid.

    `labels` (uint8, shape of the grid, 0 = nothing) has the manifest's segment values; `instances`
    (uint16, same shape) outlines the detections one by one; `maps` (float32, same shape, 0..1) are probabilities
    by their name in the manifest's `outputs.maps`. `incomplete` says in a few words each what could not be judged.
    Labels that overlap those of `labels` are in `overlapping`, arrays like it. `certainty` is how sure the model is
    of a label value (mean probability over its voxels), `classes` its answers on the whole series: by name in
    `outputs.classifications` the index of the class and its probability.
    """

    labels: npt.NDArray[np.uint8] | None = None
    instances: npt.NDArray[np.uint16] | None = None
    detections: tuple[Detection, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)
    maps: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    incomplete: tuple[str, ...] = ()
    overlapping: tuple[npt.NDArray[np.uint8], ...] = ()
    certainty: dict[int, float] = field(default_factory=dict)
    classes: dict[str, tuple[int, float]] = field(default_factory=dict)


Progress = Callable[[float], None]
"""Called with the finished fraction, 0..1."""


class Model(Protocol):
    """A loaded model: call it as often as you like."""

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Predict; raise NotApplicable where the grid is not what the model was made for."""
        ...
