"""One series becomes voxels in patient order, and a mask over those voxels becomes slices of the source again."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.uid import UID

from dicom_node.errors import InputRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.images import decoded, source_of
from dicom_node.manifest import InputSlot
from dicom_node.source import Source, SourceFrame
from workers.prediction import Grid

_THREADS = 4
_SAME_POSITION = 0.01  # mm
_SAME_ORIENTATION = 1e-3  # of a direction cosine; what viewers, too, take for the same
_SAME_SPACING = 1e-3  # mm
_STRAY = (10.0, 30.0)  # a gap of ten typical ones, and of as many mm, ends a stack
_AIR = -1024  # HU; also what lies outside a CT's reconstruction circle
_AXES = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # to the head, to the back, to the left
_NAMES = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_PLANES = {0: "axial", 1: "coronal", 2: "sagittal"}  # by the patient axis that crosses the slices

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Volume:
    """A series as a model sees it, and the way back.

    `order[n]` is the source axis (frames, rows, columns) that canonical axis n was; `flipped[n]` says that it
    runs the other way. `notes` say what of the series was left out, and why.
    """

    source: Source
    grid: Grid
    order: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    notes: tuple[str, ...] = ()

    @property
    def plane(self) -> str:
        """Return axial, coronal or sagittal: the patient plane nearest to the slices."""
        return _PLANES[self.grid.stack]

    def to_source(self, array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        """Return an array over the grid as `(frames, rows, columns)` of the source, voxel for voxel."""
        return np.ascontiguousarray(np.transpose(_flip(array, self.flipped), np.argsort(self.order)))

    def box_to_source(self, box: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return a half-open voxel box over `(k, j, i)` as one over `(frames, rows, columns)` of the source."""
        on_source = [(0, 0)] * 3
        for (first, last), axis, flip, size in zip(box, self.order, self.flipped, self.grid.values.shape, strict=True):
            on_source[axis] = (size - last, size - first) if flip else (first, last)
        return on_source


@dataclass(frozen=True, slots=True)
class _Slice:
    """One 2D image with its place; `spacing` is (between rows, between columns) in mm.

    `thickness` is what the header says of it (mm, 0 where it says nothing); `block` is the frame of reference,
    and for a frame of a multi-frame object that object: such a volume is never put together of several objects.
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

    def stacks_with(self, other: _Slice) -> bool:
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


def load(paths: Sequence[Path]) -> Volume:
    """Read the instances of one series into a volume.

    Raises:
        NotApplicable: there is no stack of slices with a place in the patient, or no pixel data.
        InputRefused: a file cannot be read, or its pixels cannot be decoded here.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        headers = list(pool.map(_header, paths))
        _require_one_series(headers)
        slices, notes = _one_stack(
            [piece for number, header in enumerate(headers) for piece in _slices(number, header)]
        )
        values = _decoded(paths, headers, slices, pool)
    used = list(dict.fromkeys(piece.instance for piece in slices))
    place = {number: index for index, number in enumerate(used)}
    source = source_of(
        (headers[number] for number in used),
        (paths[number] for number in used),
        (SourceFrame(place[piece.instance], piece.frame_number) for piece in slices),
    )
    grid, order, flipped = _canonical(values, slices)
    return Volume(source, grid, order, flipped, tuple(notes))


# -- headers ------------------------------------------------------------------------------------------------------


def _header(path: Path) -> Dataset:
    try:
        header = dcmread(path, stop_before_pixels=True)
        names = [header[keyword].value for keyword in _NAMES]
    except Exception as error:
        # pydicom answers a broken file with whatever exception comes first
        raise InputRefused(f"an instance cannot be read: {type(error).__name__}") from error
    if not all(isinstance(name, UID) and name for name in names):
        raise InputRefused(f"an instance lacks one of {', '.join(_NAMES)}")
    if names[0].type != "SOP Class":
        raise InputRefused("an instance is of no SOP Class of the standard")
    return header


def _require_one_series(headers: Sequence[Dataset]) -> None:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        if len({header[keyword].value for header in headers}) > 1:
            raise InputRefused(f"the instances of the series have more than one {keyword}")


def _slices(instance: int, header: Dataset) -> Iterable[_Slice]:
    """Yield every frame that has a place in the patient."""
    if "PerFrameFunctionalGroupsSequence" in header:
        shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
        for number, frame in enumerate(header.PerFrameFunctionalGroupsSequence, start=1):
            yield from _slice(instance, number, header, _functional(frame, shared[0]))
    elif str(header.get("NumberOfFrames") or 1) == "1":
        yield from _slice(instance, 1, header, header)


def _functional(frame: Dataset, shared: Dataset) -> Dataset:
    """Return the attributes of one frame of an enhanced object as a classic header has them (PS3.3 C.7.6.16)."""
    flat = Dataset()
    for keyword in (
        "PlanePositionSequence",
        "PlaneOrientationSequence",
        "PixelMeasuresSequence",
        "PixelValueTransformationSequence",
        "FrameContentSequence",
    ):
        items = frame.get(keyword) or shared.get(keyword)
        if items:
            flat.update(items[0])
    return flat


def _slice(instance: int, frame_number: int, header: Dataset, place: Dataset) -> Iterable[_Slice]:
    try:
        orientation = tuple(float(value) for value in place.ImageOrientationPatient)
        position = np.array([float(value) for value in place.ImagePositionPatient])
        spacing = tuple(float(value) for value in place.PixelSpacing)
        slope, intercept = float(place.get("RescaleSlope") or 1.0), float(place.get("RescaleIntercept") or 0.0)
        piece = _Slice(
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
        )
    except Exception:
        # absent, of another kind, of no kind at all: pydicom converts on access, with an exception of its own for each
        return
    if _is_usable(piece):
        yield piece


def _fits_int16(slope: float, intercept: float, header: Dataset) -> bool:
    """Return whether rescaled values are whole and fit; HU that do not fit are metal, and are cut off."""
    if slope != int(slope) or intercept != int(intercept):
        return False
    bits = int(header.get("BitsStored") or 16)
    lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if header.get("PixelRepresentation") else (0, 2**bits - 1)
    rescaled = [value * slope + intercept for value in (lowest, highest)]
    return header.get("Modality") == "CT" or (min(rescaled) >= -32768 and max(rescaled) <= 32767)


def _is_usable(piece: _Slice) -> bool:
    """Return whether the numbers describe a plane: two unit vectors at a right angle, a point, pixels of some size."""
    numbers = (*piece.orientation, *piece.position, *piece.spacing, piece.slope, piece.intercept)
    if len(piece.orientation) != 6 or len(piece.position) != 3 or not all(map(math.isfinite, numbers)):
        return False
    row, column = np.array(piece.orientation[:3]), np.array(piece.orientation[3:])
    return min(piece.spacing) > 0 and _near((row @ row, column @ column, row @ column), (1.0, 1.0, 0.0), 0.01)


def _near(some: Sequence[float], others: Sequence[float], tolerance: float) -> bool:
    return all(abs(one - other) <= tolerance for one, other in zip(some, others, strict=True))


def _one_stack(slices: Sequence[_Slice]) -> tuple[list[_Slice], list[str]]:
    """Return the largest set of parallel slices, sorted along their normal, one for each position; and notes."""
    if not slices:
        raise NotApplicable(Reason.GEOMETRY_UNUSABLE, "no image has a position and an orientation in the patient")
    stacks: list[list[_Slice]] = []
    for piece in slices:
        stack = next((stack for stack in stacks if stack[0].stacks_with(piece)), None)
        if stack is None:
            stacks.append([piece])
        else:
            stack.append(piece)
    largest = max(stacks, key=len)
    kept = _one_a_position(largest)
    gathered = _without_strays(kept)
    left_out = {
        "images of another orientation, size or object": len(slices) - len(largest),
        "images at a position that another one has": len(largest) - len(kept),
        "images far from all others": len(kept) - len(gathered),
    }
    return gathered, [f"{number} {what} left out" for what, number in left_out.items() if number]


def _one_a_position(stack: Sequence[_Slice]) -> list[_Slice]:
    """Return slices in order, of those at one position the first by acquisition: never some of each."""
    normal = stack[0].normal
    groups: list[list[_Slice]] = []
    for piece in sorted(stack, key=lambda piece: float(piece.position @ normal)):
        if groups and float((piece.position - groups[-1][0].position) @ normal) <= _SAME_POSITION:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [min(group, key=lambda piece: (piece.rank, piece.frame_number)) for group in groups]


def _without_strays(stack: list[_Slice]) -> list[_Slice]:
    """Return the longest run of slices without a gap that no scan has: a tracker image far away is no part of it."""
    gaps = np.diff([float(piece.position @ stack[0].normal) for piece in stack])
    if not len(gaps):
        return stack
    times, least = _STRAY
    ends = np.flatnonzero(gaps > max(times * float(np.median(gaps)), least)) + 1
    return max((list(run) for run in np.split(np.array(stack, object), ends)), key=len)


# -- pixels -------------------------------------------------------------------------------------------------------


def _decoded(
    paths: Sequence[Path], headers: Sequence[Dataset], slices: Sequence[_Slice], pool: ThreadPoolExecutor
) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """Return rescaled values of shape `(slices, rows, columns)`: int16 where that is exact, else float32."""
    whole = all(piece.fits_int16 for piece in slices)
    values = np.empty((len(slices), *slices[0].shape), np.int16 if whole else np.float32)
    by_instance: dict[int, list[int]] = defaultdict(list)
    for index, piece in enumerate(slices):
        by_instance[piece.instance].append(index)

    def fill(item: tuple[int, list[int]]) -> None:
        number, indices = item
        frames = [slices[index].frame_number - 1 for index in indices]
        if int(headers[number].get("SamplesPerPixel") or 1) != 1:
            raise NotApplicable(Reason.WRONG_IMAGE_TYPE, "colour images are no volume")
        for index, stored in zip(indices, decoded(paths[number], headers[number], frames), strict=True):
            values[index] = _rescaled(stored, slices[index], headers[number], values.dtype)

    list(pool.map(fill, by_instance.items()))
    return values


def _rescaled(
    stored: npt.NDArray[Any], piece: _Slice, header: Dataset, dtype: npt.DTypeLike
) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """Apply Modality LUT slope and intercept (PS3.3 C.11.1); what a CT never measured becomes air."""
    values = stored.astype(np.float32) * piece.slope + piece.intercept
    if header.get("Modality") == "CT":
        if "PixelPaddingValue" in header:
            values[_is_padding(stored, header)] = _AIR
        np.maximum(values, _AIR, out=values)
    if np.issubdtype(np.dtype(dtype), np.integer):
        np.clip(values, -32768, 32767, out=values)
    return values.astype(dtype)


def _is_padding(stored: npt.NDArray[Any], header: Dataset) -> npt.NDArray[np.bool_]:
    """Return where pixels are padding: one value or, with a limit, all between the two (PS3.3 C.7.5.1.1.2)."""
    first, last = sorted(
        (int(header.PixelPaddingValue), int(header.get("PixelPaddingRangeLimit", header.PixelPaddingValue)))
    )
    return np.asarray((stored >= first) & (stored <= last))


# -- geometry -----------------------------------------------------------------------------------------------------


def _canonical(
    values: npt.NDArray[Any], slices: Sequence[_Slice]
) -> tuple[Grid, tuple[int, int, int], tuple[bool, bool, bool]]:
    """Turn source order into patient order: each axis named after the patient axis nearest to it."""
    first = slices[0]
    rows_run, columns_run = np.array(first.orientation[3:]), np.array(first.orientation[:3])
    directions = np.stack([first.normal, rows_run, columns_run])  # of the source axes: frames, rows, columns
    order = _nearest(directions)
    flipped = tuple(bool(directions[axis] @ _AXES[n] < 0) for n, axis in enumerate(order))
    stack = order.index(0)
    positions = np.array([piece.position for piece in slices])
    along = positions @ first.normal
    origins = positions + _corner(first, order, flipped)
    gap = float(np.median(np.diff(along))) if len(slices) > 1 else first.thickness or 1.0
    spacing = (gap, *first.spacing)
    thickness = _thickness(along, gap)
    if flipped[stack]:
        along, origins, thickness = -along[::-1], origins[::-1], thickness[::-1]
    grid = Grid(
        values=np.ascontiguousarray(_flip(np.transpose(values, order), flipped)),
        spacing=(spacing[order[0]], spacing[order[1]], spacing[order[2]]),
        stack=stack,
        positions=along,
        thickness=thickness,
        directions=np.array([directions[axis] * (-1 if flipped[n] else 1) for n, axis in enumerate(order)]),
        origins=origins,
    )
    return grid, order, (flipped[0], flipped[1], flipped[2])


def _nearest(directions: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    """Return for each patient axis the source axis nearest to it, each used once, the clearest match first."""
    likeness = np.abs(_AXES @ directions.T)
    order = [0, 0, 0]
    for _ in range(3):
        patient, axis = np.unravel_index(np.argmax(likeness), likeness.shape)
        order[patient] = int(axis)
        likeness[patient, :] = -1
        likeness[:, axis] = -1
    return order[0], order[1], order[2]


def _corner(first: _Slice, order: Sequence[int], flipped: Sequence[bool]) -> npt.NDArray[np.float64]:
    """Return the way from a slice's first pixel to the pixel that is first in patient order, mm."""
    way = np.zeros(3)
    rows_run, columns_run = np.array(first.orientation[3:]), np.array(first.orientation[:3])
    for n, axis in enumerate(order):
        if flipped[n] and axis == 1:
            way += rows_run * first.spacing[0] * (first.shape[0] - 1)
        if flipped[n] and axis == 2:
            way += columns_run * first.spacing[1] * (first.shape[1] - 1)
    return way


def _thickness(along: npt.NDArray[np.float64], gap: float) -> npt.NDArray[np.float64]:
    """Return what each plane stands for, mm: half the way to each neighbour, at the ends half a typical gap."""
    if len(along) == 1:
        return np.array([gap])
    gaps = np.concatenate([[gap], np.diff(along), [gap]])
    return np.asarray((gaps[:-1] + gaps[1:]) / 2)


def _flip(array: npt.NDArray[Scalar], flipped: Sequence[bool]) -> npt.NDArray[Scalar]:
    return array[tuple(slice(None, None, -1 if flip else 1) for flip in flipped)]


# -- fitness ------------------------------------------------------------------------------------------------------


def check_input(volume: Volume, slot: InputSlot) -> None:
    """Raise NotApplicable with the first reason why the series is not what the model was made for."""
    header = volume.source.datasets[0]
    modality = str(header.get("Modality") or "")
    if modality not in slot.modality:
        raise NotApplicable(Reason.WRONG_MODALITY, f"{modality or 'none'}, made for {', '.join(slot.modality)}")
    body_part = str(header.get("BodyPartExamined") or "").strip().upper()
    if slot.body_part and body_part and body_part not in slot.body_part:
        raise NotApplicable(Reason.WRONG_BODY_PART, f"{body_part}, made for {', '.join(slot.body_part)}")
    stated = header.get("ImageType") or ()
    image_type = {str(value).upper() for value in ([stated] if isinstance(stated, str) else stated)}
    if unwanted := image_type & set(slot.image_type_excludes):
        raise NotApplicable(Reason.WRONG_IMAGE_TYPE, ", ".join(sorted(unwanted)))
    if slot.orientation not in ("any", volume.plane):
        raise NotApplicable(Reason.WRONG_ORIENTATION, f"{volume.plane}, made for {slot.orientation}")
    _check_spacing(volume, slot)


def _check_spacing(volume: Volume, slot: InputSlot) -> None:
    frames = len(volume.source.frames)
    if frames not in slot.frames:
        raise NotApplicable(
            Reason.TOO_FEW_SLICES, f"{frames} slices, made for {slot.frames.min:g} to {slot.frames.max:g}"
        )
    spacing = volume.grid.spacing
    stack = volume.grid.stack
    in_plane = [value for axis, value in enumerate(spacing) if axis != stack]
    if spacing[stack] not in slot.slice_spacing:
        raise NotApplicable(Reason.SPACING_OUT_OF_RANGE, f"slices {spacing[stack]:.2f} mm apart")
    if any(value not in slot.in_plane_spacing for value in in_plane):
        raise NotApplicable(Reason.SPACING_OUT_OF_RANGE, f"pixels {max(in_plane):.2f} mm apart")
