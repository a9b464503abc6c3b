"""What a model takes: which series of the study, and how its voxels are prepared."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydicom.datadict import tag_for_keyword

from dicom_node.manifest.entries import Axes, Frozen, Range

Millimetres = Annotated[float, Field(gt=0)]
Preference = Literal["thinnest", "soft_kernel", "most_slices", "newest"]


class Intensity(Frozen):
    """How values are brought into the range that a network was trained on: clipped first, then scaled.

    `clip` is in the image's own units (HU, SUV), `clip_percentiles` in percent of all voxels. `scale` is `range`:
    what is left of the clip linearly to `to`; or `zscore`: minus mean, by standard deviation, which are those of
    the volume (of its values above zero where `over` is `positive`) unless `mean` and `std` state them.
    """

    clip: tuple[float, float] | None = None
    clip_percentiles: tuple[float, float] | None = None
    scale: Literal["none", "range", "zscore"] = "none"
    to: tuple[float, float] = (0.0, 1.0)
    over: Literal["all", "positive"] = "all"
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None


class InputSlot(Frozen):
    """One series that the model needs, what it must be like, and how it is prepared.

    `body_part` is looked at only where the series states one: many scanners leave it empty. `when` are regular
    expressions over DICOM keywords, as in a route. Where several routed series of a study qualify, `prefer` says in
    which order they are compared, and only the best is run; without it every one is. `dimensions` is 3 for a volume
    in patient space, 2 for single frames.
    `axes`, `spacing` (mm) and `shape` describe the array that the network sees, in its own axis order.
    `intensities` stand in for `intensity` where the modality is the key.
    """

    modality: tuple[str, ...]
    body_part: tuple[str, ...] = ()
    image_type: tuple[str, ...] = ()
    image_type_excludes: tuple[str, ...] = ("LOCALIZER",)
    orientation: Literal["axial", "coronal", "sagittal", "any"] = "any"
    contrast: Literal["with", "without", "any"] = "any"
    when: Mapping[str, str] = Field(default_factory=dict)
    frames: Range = Range(min=1)
    in_plane_spacing: Range = Range()  # mm
    slice_spacing: Range = Range()  # mm
    slice_thickness: Range = Range()  # mm
    prefer: tuple[Preference, ...] = ()
    dimensions: Literal[2, 3] = 3
    axes: Axes = "SPL"
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    shape: tuple[int, int, int] | None = None
    fit: Literal["crop_pad", "resize"] = "crop_pad"
    intensity: Intensity = Intensity()
    intensities: Mapping[str, Intensity] = Field(default_factory=dict)

    @field_validator("when")
    @classmethod
    def _keywords_and_patterns(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for key, pattern in value.items():
            if tag_for_keyword(key) is None:
                raise ValueError(f"{key!r} is no DICOM keyword")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{key}: {pattern!r} is no regular expression: {error}") from error
        return value
