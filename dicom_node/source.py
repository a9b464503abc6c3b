"""The images a result was made from: their headers, in the order of the mask's first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
from pydicom import Dataset


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """One 2D image: which instance of `Source.datasets`, and which of its frames (from 1, PS3.3 C.7.6.6)."""

    instance: int
    frame_number: int = 1


@dataclass(frozen=True, slots=True)
class Source:
    """One series as a model saw it.

    `datasets` are headers without pixel data, never changed, perhaps read only when they are asked for. `frames`
    are in the order of axis 0 of every label array: for a classic series one frame per dataset, for a multi-frame
    object one dataset for all.
    `pixels` decodes a frame on demand: stored values, shape `(rows, columns)`, or `(rows, columns, 3)` in RGB.
    """

    datasets: Sequence[Dataset]
    frames: tuple[SourceFrame, ...]
    pixels: Callable[[int], npt.NDArray[Any]] | None = field(default=None, compare=False, repr=False)

    def header_of(self, frame: int) -> Dataset:
        """Return the header of frame number `frame` (index on axis 0) as a classic image has it."""
        place = self.frames[frame]
        return flat(self.datasets[place.instance], place.frame_number)

    def dataset_of(self, frame: int) -> Dataset:
        """Return the header that frame number `frame` (index on axis 0) belongs to."""
        return self.datasets[self.frames[frame].instance]


_FRAME_SEQUENCES = (
    "FrameVOILUTSequence",
    "PixelValueTransformationSequence",
    "PixelMeasuresSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
)


def flat(header: Dataset, frame_number: int) -> Dataset:
    """Return a header as a classic image has it; for an enhanced object that of one frame (from 1, PS3.3 C.7.6.16)."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        return header
    made = Dataset()
    made.update(header)
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for groups in (shared, header.PerFrameFunctionalGroupsSequence[frame_number - 1]):
        for keyword in _FRAME_SEQUENCES:
            if groups.get(keyword):
                made.update(groups[keyword][0])
    return made
