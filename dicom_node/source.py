"""The images a result was made from: their headers, in the order of the mask's first axis."""

from __future__ import annotations

from dataclasses import dataclass

from pydicom import Dataset


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """One 2D image: which instance of `Source.datasets`, and which of its frames (from 1, PS3.3 C.7.6.6)."""

    instance: int
    frame_number: int = 1


@dataclass(frozen=True, slots=True)
class Source:
    """One series as a model saw it.

    `datasets` are headers without pixel data, never changed. `frames` are in the order of axis 0 of every
    label array: for a classic series one frame per dataset, for a multi-frame object one dataset for all.
    """

    datasets: tuple[Dataset, ...]
    frames: tuple[SourceFrame, ...]

    def dataset_of(self, frame: int) -> Dataset:
        """Return the header that frame number `frame` (index on axis 0) belongs to."""
        return self.datasets[self.frames[frame].instance]
