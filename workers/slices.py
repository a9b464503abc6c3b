"""Headers become slices: images with a place in the patient, and what tells one acquisition from another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.uid import UID

from dicom_node import rations
from dicom_node.errors import InputRefused

_SAME_ORIENTATION = 1e-3  # of a direction cosine; what viewers, too, take for the same
_SAME_SPACING = 1e-3  # mm
_NAMES = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_FRAME_GROUPS = (
    # functional groups whose attributes a classic header has itself (PS3.3 C.7.6.16)
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "FrameContentSequence",
    "MRImageFrameTypeSequence",
    "CTImageFrameTypeSequence",
    "MREchoSequence",
    "MRDiffusionSequence",
    "CTReconstructionSequence",
    "TemporalPositionSequence",
    "CardiacSynchronizationSequence",
)
TRAITS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # what may differ between images of one place, the clearest difference first
    ("ImageType", ("ImageType", "FrameType", "ComplexImageComponent")),
    ("EchoTime", ("EffectiveEchoTime", "EchoTime")),
    ("DiffusionBValue", ("DiffusionBValue",)),
    ("DiffusionDirectionality", ("DiffusionDirectionality",)),
    ("DiffusionGradientOrientation", ("DiffusionGradientOrientation",)),
    ("TemporalPosition", ("TemporalPositionIndex", "TemporalPositionIdentifier")),
    ("ConvolutionKernel", ("ConvolutionKernel",)),
    ("CardiacPhase", ("NominalPercentageOfCardiacPhase", "NominalCardiacTriggerDelayTime", "TriggerTime")),
    ("AcquisitionNumber", ("FrameAcquisitionNumber", "AcquisitionNumber")),
    ("AcquisitionTime", ("AcquisitionTime",)),
)


@dataclass(frozen=True, slots=True)
class Slice:
    """One 2D image with its place; `spacing` is (between rows, between columns) in mm.

    `thickness` is what the header says of it (mm, 0 where it says nothing); `block` is the frame of reference,
    and for a frame of a multi-frame object that object: such a volume is never put together of several objects.
    `traits` are what may differ between images of one place, in the order of TRAITS.
    """

    instance: int
    frame_number: int
    orientation: tuple[float, ...]
    position: npt.NDArray[np.float64]
    spacing: tuple[float, float]
    thickness: float
    shape: tuple[int, int]
    slope: float
    intercept: float
    fits_int16: bool
    rank: tuple[int, int]
    block: tuple[str, int]
    traits: tuple[str, ...] = field(default=("",) * len(TRAITS))

    def stacks_with(self, other: Slice) -> bool:
        """Return whether both can be slices of one stack; scanners round, so near enough is the same."""
        return (
            self.block == other.block
            and self.shape == other.shape
            and _near(self.orientation, other.orientation, _SAME_ORIENTATION)
            and _near(self.spacing, other.spacing, _SAME_SPACING)
        )

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        """Return the unit vector that rows and columns span no part of."""
        row, column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        normal = np.cross(row, column)
        return np.asarray(normal / np.linalg.norm(normal))


def read_header(path: Path) -> Dataset:
    """Read a header without pixel data; raise InputRefused where it cannot be read or lacks its names."""
    try:
        header = rations.read(path, stop_before_pixels=True)
        names = [header[keyword].value for keyword in _NAMES]
        rations.require_plausible(header, path.stat().st_size)
    except InputRefused:
        raise
    except Exception as error:
        # pydicom answers a broken file with whatever exception comes first
        raise InputRefused(f"an instance cannot be read: {type(error).__name__}") from error
    if not all(isinstance(name, UID) and name for name in names):
        raise InputRefused(f"an instance lacks one of {', '.join(_NAMES)}")
    if names[0].type != "SOP Class":
        raise InputRefused("an instance is of no SOP Class of the standard")
    return header


def require_one_series(headers: Sequence[Dataset]) -> None:
    """Raise InputRefused where headers are of more than one study or series."""
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        if len({header[keyword].value for header in headers}) > 1:
            raise InputRefused(f"the instances of the series have more than one {keyword}")


def slices_of(instance: int, header: Dataset) -> Iterator[Slice]:
    """Yield every frame that has a place in the patient."""
    if "PerFrameFunctionalGroupsSequence" in header:
        shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
        for number, frame in enumerate(header.PerFrameFunctionalGroupsSequence, start=1):
            yield from _slice(instance, number, header, _functional(frame, shared[0]))
    elif str(header.get("NumberOfFrames") or 1) == "1":
        yield from _slice(instance, 1, header, header)


def flat_header(header: Dataset, frame_number: int) -> Dataset:
    """Return a header as a classic image has it: of an enhanced object that of one frame (from 1)."""
    if "PerFrameFunctionalGroupsSequence" not in header:
        return header
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    made = Dataset()
    made.update(header)
    made.update(_functional(header.PerFrameFunctionalGroupsSequence[frame_number - 1], shared))
    return made


def _functional(frame: Dataset, shared: Dataset) -> Dataset:
    """Return the attributes of one frame of an enhanced object as a classic header has them (PS3.3 C.7.6.16)."""
    flat = Dataset()
    for keyword in _FRAME_GROUPS:
        items = frame.get(keyword) or shared.get(keyword)
        if items:
            flat.update(items[0])
    if flat.get("DiffusionGradientDirectionSequence"):
        flat.update(flat.DiffusionGradientDirectionSequence[0])
    return flat


def _slice(instance: int, frame_number: int, header: Dataset, place: Dataset) -> Iterable[Slice]:
    try:
        orientation = tuple(float(value) for value in place.ImageOrientationPatient)
        position = np.array([float(value) for value in place.ImagePositionPatient])
        spacing = tuple(float(value) for value in place.PixelSpacing)
        slope, intercept = float(place.get("RescaleSlope") or 1.0), float(place.get("RescaleIntercept") or 0.0)
        piece = Slice(
            instance=instance,
            frame_number=frame_number,
            orientation=orientation,
            position=position,
            spacing=(spacing[0], spacing[1]),
            thickness=float(place.get("SliceThickness") or 0.0),
            shape=(int(header.Rows), int(header.Columns)),
            slope=slope,
            intercept=intercept,
            fits_int16=_fits_int16(slope, intercept, header),
            rank=(int(header.get("AcquisitionNumber") or 0), int(header.get("InstanceNumber") or 0)),
            block=(str(header.get("FrameOfReferenceUID") or ""), -1 if place is header else instance),
            traits=tuple(_trait(place, keywords) for _, keywords in TRAITS),
        )
    except Exception:
        # absent, of another kind, of no kind at all: pydicom converts on access, with an exception of its own for each
        return
    if _is_usable(piece):
        yield piece


def _trait(place: Dataset, keywords: Sequence[str]) -> str:
    """Return the first of some attributes that says anything, as text."""
    for keyword in keywords:
        value: Any = place.get(keyword)
        if value is not None and str(value) != "":
            return str(value)
    return ""


def _fits_int16(slope: float, intercept: float, header: Dataset) -> bool:
    """Return whether rescaled values are whole and fit; HU that do not fit are metal, and are cut off."""
    if slope != int(slope) or intercept != int(intercept):
        return False
    bits = int(header.get("BitsStored") or 16)
    lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if header.get("PixelRepresentation") else (0, 2**bits - 1)
    rescaled = [value * slope + intercept for value in (lowest, highest)]
    return header.get("Modality") == "CT" or (min(rescaled) >= -32768 and max(rescaled) <= 32767)


def _is_usable(piece: Slice) -> bool:
    """Return whether the numbers describe a plane: two unit vectors at a right angle, a point, pixels of some size."""
    numbers = (*piece.orientation, *piece.position, *piece.spacing, piece.slope, piece.intercept)
    if len(piece.orientation) != 6 or len(piece.position) != 3 or not all(map(math.isfinite, numbers)):
        return False
    row, column = np.array(piece.orientation[:3]), np.array(piece.orientation[3:])
    return min(piece.spacing) > 0 and _near((row @ row, column @ column, row @ column), (1.0, 1.0, 0.0), 0.01)


def _near(some: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return all(abs(one - other) <= tolerance for one, other in zip(some, others, strict=True))
