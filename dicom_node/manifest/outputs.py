"""What a model's numbers mean: label values, detections, classes, maps; and when to doubt them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from dicom_node.manifest.entries import CodeEntry, Frozen, Name, Range

Colour = tuple[
    Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
]
Fraction = Annotated[float, Field(ge=0, le=1)]
Measured = Literal["volume", "diameter", "short_axis", "mean"]


class SegmentOutput(Frozen):
    """What one label value of a model's mask means.

    With `instances` each connected piece is a segment of its own, numbered from the largest; with `keep` of
    `largest` the pieces but the largest are dropped before anything else.
    """

    label: str
    category: CodeEntry
    type: CodeEntry
    site: CodeEntry | None = None
    laterality: Literal["left", "right"] | None = None
    colour: Colour
    measurements: tuple[Measured, ...] = ("volume",)
    instances: bool = False
    keep: Literal["all", "largest"] = "all"


class DetectionOutput(Frozen):
    """What one kind of detection of a model means; `value` is its class in a network's answer."""

    label: str
    category: CodeEntry
    finding: CodeEntry
    site: CodeEntry | None = None
    colour: Colour
    value: int = 0
    threshold: Fraction = 0.5


class ClassificationOutput(Frozen):
    """What a network says of the whole series: `concept` is the question, `classes` the answers by index."""

    label: str
    concept: CodeEntry
    classes: Mapping[int, CodeEntry]


class MapOutput(Frozen):
    """What one map of probabilities means; `channel` is its place in a network's answer."""

    label: str
    quantity: CodeEntry = CodeEntry(value="122157", scheme="DCM", meaning="Probability")
    channel: int = 0


class Boxes(Frozen):
    """How a network writes boxes: which of its answers they are, and how each is laid out.

    `corners`: the least of every axis, then the greatest; `pairs`: least and greatest axis by axis;
    `centre_size`: centres, then lengths. Axes are those of the input; values are voxels of it.
    """

    format: Literal["corners", "pairs", "centre_size"] = "corners"
    boxes: int | str = "boxes"
    scores: int | str = "scores"
    labels: int | str = "labels"
    overlap: Fraction = 0.5  # of two boxes (intersection over union) above which the less sure is dropped


class Outputs(Frozen):
    """Everything that the model may say: label value -> segment, names -> detections, classes, maps.

    `activation` says how a network's channels become label values: `softmax` the largest channel, `sigmoid` each
    channel above `threshold` (channel c is value c + 1; they may overlap), `labels` the answer has label values
    already. `output` is which of several answers, by place or name.
    """

    segments: Mapping[int, SegmentOutput] = Field(default_factory=dict)
    detections: Mapping[str, DetectionOutput] = Field(default_factory=dict)
    classifications: Mapping[Name, ClassificationOutput] = Field(default_factory=dict)
    maps: Mapping[str, MapOutput] = Field(default_factory=dict)
    activation: Literal["softmax", "sigmoid", "labels"] = "softmax"
    threshold: Fraction = 0.5
    output: int | str = 0
    boxes: Boxes | None = None
    window: tuple[float, Annotated[float, Field(ge=1)]] | None = None  # centre, width: how a picture shows it best


class Guard(Frozen):
    """When a segment cannot be right. Beyond `volume` (ml), in more than `components` pieces, with less than
    `largest_component` (0..1) in one piece or below `confidence` (mean probability) the model does not apply.
    So it does where what is bright around the segment is less than `surroundings` of its volume: a brain has a scalp
    and a face around it, a melon has not. A segment that touches the edge of the images is allowed, makes the result
    partial, or is refused.
    """

    volume: Range = Range()
    components: Annotated[int, Field(ge=1)] | None = None
    largest_component: Fraction = 0.0
    confidence: Fraction = 0.0
    surroundings: Annotated[float, Field(ge=0)] = 0.0
    border: Literal["allow", "partial", "refuse"] = "allow"
