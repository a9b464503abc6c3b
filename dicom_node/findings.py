"""What a model says about a series: segments, findings, measurements and their codes. No DICOM object in sight."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt


class Reason(StrEnum):
    """Why a model does not apply to a series; the code `history` shows."""

    WRONG_MODALITY = "wrong_modality"
    WRONG_BODY_PART = "wrong_body_part"
    WRONG_IMAGE_TYPE = "wrong_image_type"
    WRONG_CONTRAST = "wrong_contrast"
    WRONG_HEADER = "wrong_header"
    WRONG_ORIENTATION = "wrong_orientation"
    TOO_FEW_SLICES = "too_few_slices"
    SPACING_OUT_OF_RANGE = "spacing_out_of_range"
    GEOMETRY_UNUSABLE = "geometry_unusable"
    NO_PIXEL_DATA = "no_pixel_data"
    NO_SUV = "no_suv"
    ORGAN_NOT_FOUND = "organ_not_found"
    MISSING_INPUT = "missing_input"
    BETTER_SERIES = "better_series"
    OTHER_FRAME_OF_REFERENCE = "other_frame_of_reference"
    VOLUME_OUT_OF_RANGE = "volume_out_of_range"
    IN_PIECES = "in_pieces"
    NOTHING_AROUND = "nothing_around"
    CUT_OFF = "cut_off"
    UNSURE = "unsure"


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept (PS3.3 Section 8.8): value, coding scheme designator, meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number with its concept name and UCUM unit."""

    name: Code
    value: float
    unit: Code
    derivation: Code | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """One structure: the voxels where `Findings.labels[layer] == value`.

    `tracking_uid` is the identity that the SEG's segment and the SR's groups share.
    """

    layer: int
    value: int
    label: str
    category: Code
    type: Code
    colour: tuple[int, int, int]  # sRGB, 0..255
    tracking_identifier: str
    tracking_uid: str
    site: Code | None = None
    laterality: Code | None = None
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True)
class Box:
    """A box on one source frame in DICOM image coordinates (PS3.3 C.10.5.1.2).

    The origin is the top-left corner of the top-left pixel, so a half-open numpy box
    `[top:bottom, left:right]` is exactly these four numbers, in pixels.
    """

    frame: int  # index into Source.frames, the axis 0 of every label array
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing detected: its box on the key frame, the segment that outlines it, how sure the model is."""

    label: str
    finding: Code
    category: Code
    box: Box
    confidence: float  # 0..1
    tracking_identifier: str
    tracking_uid: str
    segment: int | None = None  # index into Findings.segments
    site: Code | None = None
    laterality: Code | None = None
    measurements: tuple[Measurement, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says of the whole series: the question, the answer, and how sure it is (0..1)."""

    label: str
    question: Code
    answer: Code
    probability: float
    tracking_uid: str


@dataclass(frozen=True, slots=True)
class Map:
    """A probability for each voxel: float32 of shape `(frames, rows, columns)` on the source's grid, 0..1."""

    label: str
    quantity: Code
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that one model said about one series.

    `labels` are arrays of unsigned integers, each of shape `(frames, rows, columns)` on the source's own
    grid, 0 where nothing is. Segments in one array cannot overlap; those that do are in different arrays.
    `looked_for` names what a negative answer is about. `incomplete` says, in a few words each, what part of the
    question the model could not answer; where it is empty the answer is whole.
    """

    labels: tuple[npt.NDArray[np.unsignedinteger], ...] = ()
    segments: tuple[Segment, ...] = ()
    findings: tuple[Finding, ...] = ()
    looked_for: tuple[Code, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)
    incomplete: tuple[str, ...] = ()
    maps: tuple[Map, ...] = ()
    answers: tuple[Answer, ...] = ()
    window: tuple[float, float] | None = None  # centre and width that show best what it is about, in the image's units

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers that have a segment: one segmentation object each."""
        return tuple(sorted({segment.layer for segment in self.segments}))

    def segments_of(self, layer: int) -> tuple[Segment, ...]:
        """Return the segments of one layer in the order of their Segment Numbers: 1, 2, 3 without a gap."""
        return tuple(segment for segment in self.segments if segment.layer == layer)

    @property
    def is_negative(self) -> bool:
        """True when the model ran, looked for findings and reports none."""
        return bool(self.looked_for) and not self.findings
