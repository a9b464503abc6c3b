"""The images a result was made from: their headers, in the order of the mask's first axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy.typing as npt
from pydicom import Dataset


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """One 2D image: which instance of `Source.datasets`, and which of its frames (from 1, PS3.3 C.7.6.6)."""

    instance: int
    frame_number: int = 1


@dataclass(frozen=True, slots=True)
class Instance:
    """What is different in every image of a series, and must be said of each in a result.

    `position` is Image Position (Patient) as it is written, mm; empty where there is none. `like` is the number of an
    image (index into `Source.datasets`) whose header says the same of class, study, series, frames, frame of
    reference, size and direction: the image itself, or one before it.
    """

    sop_instance_uid: str
    position: tuple[str, ...]
    like: int


class Lazy(Sequence[Dataset]):
    """Headers of images, each made when it is asked for, and the same object every time."""

    def __init__(self, number: int, known: Mapping[int, Dataset]) -> None:
        """Have `number` headers, of which some are `known`, by their index."""
        self._number = number
        self._known = dict(known)

    def make(self, number: int) -> Dataset:
        """Return a header that is not known yet."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return how many there are."""
        return self._number

    @overload
    def __getitem__(self, number: int) -> Dataset: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Dataset]: ...
    def __getitem__(self, number: int | slice) -> Dataset | Sequence[Dataset]:
        """Return a header, or those of a slice; what `make` raises."""
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        number = range(len(self))[number]
        if number not in self._known:
            self._known[number] = self.make(number)
        return self._known[number]


@dataclass(frozen=True, slots=True)
class Source:
    """One series as a model saw it.

    `datasets` are headers without pixel data, never changed, perhaps read only when they are asked for; `known` is
    what is known of each without reading it. `frames` are in the order of axis 0 of every label array: for a classic
    series one frame per dataset, for a multi-frame object one dataset for all.
    `pixels` decodes a frame on demand: stored values, shape `(rows, columns)`, or `(rows, columns, 3)` in RGB.
    """

    datasets: Sequence[Dataset]
    frames: tuple[SourceFrame, ...]
    pixels: Callable[[int], npt.NDArray[Any]] | None = field(default=None, compare=False, repr=False)
    known: tuple[Instance, ...] | None = field(default=None, compare=False, repr=False)

    @property
    def instances(self) -> tuple[Instance, ...]:
        """Return what is different in each of `datasets`, in the same order."""
        if self.known is not None:
            return self.known
        return tuple(instance_of(dataset, number) for number, dataset in enumerate(self.datasets))

    def header_of(self, frame: int) -> Dataset:
        """Return the header of frame number `frame` (index on axis 0) as a classic image has it."""
        place = self.frames[frame]
        return flat(self.datasets[place.instance], place.frame_number)

    def dataset_of(self, frame: int) -> Dataset:
        """Return the header that frame number `frame` (index on axis 0) belongs to."""
        return self.datasets[self.frames[frame].instance]


def instance_of(header: Dataset, number: int) -> Instance:
    """Return what a header says of its own image alone; it is like no other."""
    position = header.get("ImagePositionPatient") or ()
    return Instance(str(header.SOPInstanceUID), tuple(str(value) for value in position), number)


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
