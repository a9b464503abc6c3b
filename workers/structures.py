"""Label values become segments: one for each structure or each of its pieces, with what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dicom_node.errors import ModelRefused
from dicom_node.findings import Code, Segment
from dicom_node.labelling import Context
from dicom_node.manifest import Manifest, SegmentOutput
from workers.boxes import Box, boxes_of
from workers.prediction import Grid, Prediction
from workers.quantities import Mask, measured

LATERALITY: dict[str | None, Code | None] = {
    "right": Code("24028007", "SCT", "Right"),
    "left": Code("7771000", "SCT", "Left"),
    None: None,
}
_TOUCHING = np.ones((3, 3, 3), bool)  # pieces that share a corner are one
_MOST_PIECES = 200  # of one structure; more are noise, and no report can be read that lists them

Labels = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class Structures:
    """Segments and their label arrays over the grid `(k, j, i)`, one for each layer."""

    labels: tuple[Labels, ...]
    segments: tuple[Segment, ...]


def structures(prediction: Prediction, grid: Grid, manifest: Manifest, context: Context) -> Structures:
    """Return every structure that has a voxel, in the order of its layer and value.

    Raises:
        ModelRefused: a label value is not in the manifest.
    """
    layers = [] if prediction.labels is None else [prediction.labels, *prediction.overlapping]
    arrays: list[Labels] = []
    segments: list[Segment] = []
    for layer in layers:
        labels, found = _layer(layer, len(arrays), grid, manifest, context)
        if found:
            arrays.append(labels)
            segments += found
    return Structures(tuple(arrays), tuple(segments))


def _layer(
    labels: npt.NDArray[np.uint8], number: int, grid: Grid, manifest: Manifest, context: Context
) -> tuple[Labels, list[Segment]]:
    outputs = manifest.outputs.segments
    boxes = boxes_of(labels)
    if unknown := boxes.keys() - outputs.keys():
        raise ModelRefused(f"{manifest.name}: label values {sorted(unknown)} are not in outputs.segments")
    if not any(outputs[value].instances for value in boxes):
        return labels, [
            _segment(outputs[value], value, number, labels[box] == value, box, grid, context)
            for value, box in boxes.items()
        ]
    made: npt.NDArray[np.uint16] = np.zeros(labels.shape, np.uint16)
    segments: list[Segment] = []
    for value, whole in boxes.items():
        pieces = list(_pieces(labels[whole] == value, whole)) if outputs[value].instances else None
        for place, (mask, box) in enumerate(pieces or [(labels[whole] == value, whole)], start=1):
            made[box][mask] = len(segments) + 1
            instance = place if pieces else 0
            segments.append(
                _segment(outputs[value], value, number, mask, box, grid, context, len(segments) + 1, instance)
            )
    return made, segments


def _pieces(mask: Mask, whole: Box) -> Iterator[tuple[Mask, Box]]:
    """Yield each connected piece of a mask that lies in the box `whole`, with its own box, the largest first."""
    numbered, count = ndimage.label(mask, structure=_TOUCHING)
    boxes: Sequence[Box] = ndimage.find_objects(numbered)
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)[1:]
    for number in np.argsort(-sizes, kind="stable")[:_MOST_PIECES]:
        box = boxes[number]
        yield numbered[box] == number + 1, _within(box, whole)


def _within(box: Box, whole: Box) -> Box:
    """Return a box of the box `whole` as one of all voxels."""
    k, j, i = (slice(each.start + by.start, each.stop + by.start) for each, by in zip(box, whole, strict=True))
    return k, j, i


def _segment(
    output: SegmentOutput,
    value: int,
    layer: int,
    mask: Mask,
    box: Box,
    grid: Grid,
    context: Context,
    stored: int | None = None,
    instance: int = 0,
) -> Segment:
    """Return a segment; `stored` is its value in the layer where that is another, `instance` its number from 1."""
    label = f"{output.label} {instance}" if instance else output.label
    ordinal = value if not instance else value * 1000 + instance
    return Segment(
        layer=layer,
        value=stored or value,
        label=label,
        category=output.category.code(),
        type=output.type.code(),
        colour=output.colour,
        tracking_identifier=label,
        tracking_uid=context.uid("tracking segment", ordinal),
        site=output.site.code() if output.site else None,
        laterality=LATERALITY[output.laterality],
        measurements=measured(output.measurements, mask, box, grid),
    )
