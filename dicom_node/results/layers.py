"""What a model's labels have on each plane: looked at once, for every kind of result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dicom_node.findings import Box, Findings, Segment
from dicom_node.results.packing import Extent, extents

Labels = npt.NDArray[np.unsignedinteger]
"""Shape `(frames, rows, columns)`."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Labels, and for each plane of them the values it has with where they are."""

    labels: Labels
    contents: tuple[dict[int, Extent], ...]

    @classmethod
    def of(cls, labels: Labels) -> Planes:
        """Look at each plane once."""
        return cls(labels, tuple(extents(plane) for plane in labels))

    def count(self, value: int) -> int:
        """Return on how many planes a value is."""
        return sum(value in content for content in self.contents)

    def numbered(self, segments: Sequence[Segment]) -> Labels:
        """Return the labels with each segment's value replaced by its Segment Number, everything else 0."""
        return numbers(self.labels, segments)[self.labels]

    def box_of(self, value: int) -> Box:
        """Return the box around a value on the plane that has most of it, the first of several."""
        plane = max(
            (number for number, content in enumerate(self.contents) if value in content),
            key=lambda number: self.contents[number][value].pixels,
        )
        first, after, _ = self.contents[plane][value]
        columns = np.flatnonzero((self.labels[plane][first:after] == value).any(axis=0))
        return Box(plane, float(columns[0]), float(first), float(columns[-1] + 1), float(after))


def numbers(labels: Labels, segments: Sequence[Segment]) -> Labels:
    """Return for each value that labels can have its Segment Number, from 1; 0 where it is no segment's."""
    table: Labels = np.zeros(np.iinfo(labels.dtype).max + 1, np.uint8 if len(segments) <= 255 else np.uint16)
    for number, segment in enumerate(segments, start=1):
        table[segment.value] = number
    return table


class Layers:
    """The layers of a model's labels, each looked at when it is first asked for."""

    def __init__(self, findings: Findings) -> None:
        """Take the labels of `findings`."""
        self._labels = findings.labels
        self._looked_at: dict[int, Planes] = {}

    def __getitem__(self, layer: int) -> Planes:
        """Return a layer; its planes are in the order of the source's frames."""
        if layer not in self._looked_at:
            self._looked_at[layer] = Planes.of(self._labels[layer])
        return self._looked_at[layer]

    def box_of(self, segment: Segment) -> Box:
        """Return the box around a segment on the frame that shows the most of it."""
        return self[segment.layer].box_of(segment.value)
