"""One series becomes voxels in patient order, and a mask over those voxels becomes slices of the source again."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from dicom_node.decoders import lets_others_run, require_plausible_frame, values_of
from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from dicom_node.images import decoded, source_of
from dicom_node.manifest import InputSlot
from dicom_node.selection import stack_objections
from dicom_node.source import Source, SourceFrame
from dicom_node.suv import first_acquisition, suv_factor
from workers.frames import frames_of
from workers.plain import Headers, Plain, glance, headers_of, instances_of, placed, plain_frame, plain_words, to_read
from workers.prediction import Grid
from workers.rescaling import Meanings, scaled
from workers.slices import Slice, flat_header, read_header, require_one_series
from workers.stacks import best_stack

_THREADS = max(4, min(8, len(os.sched_getaffinity(0))))
_TOGETHER = 16  # frames of one object that are decoded at once
_AXES = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # to the head, to the back, to the left
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
    order: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)
    notes: tuple[str, ...] = ()

    @property
    def header(self) -> Dataset:
        """Return the header of the middle image, flat: what it says of acquisition holds for all of them."""
        place = self.source.frames[len(self.source.frames) // 2]
        return flat_header(self.source.datasets[place.instance], place.frame_number)

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
        for (first, last), axis, flip, size in zip(box, self.order, self.flipped, self.grid.shape, strict=True):
            on_source[axis] = (size - last, size - first) if flip else (first, last)
        return on_source


def load(paths: Sequence[Path], slot: InputSlot | None = None) -> Volume:
    """Read the instances of one series into a volume; of several acquisitions that which suits `slot`.

    With `slot.dimensions` of 2 every frame is taken as it is stored, without a place in the patient.

    Raises:
        NotApplicable: there is no stack of slices with a place in the patient, or no pixel data.
        InputRefused: a file cannot be read, or its pixels cannot be decoded here.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        glances = list(pool.map(glance, paths))
        headers = headers_of(paths, glances, pool.map(read_header, [paths[number] for number in to_read(glances)]))
        require_one_series(headers.different())
        if slot is not None and slot.dimensions == 2:
            source, grid, left_out = frames_of(paths, headers, pool)
            return Volume(source, grid, notes=(left_out,) if left_out else ())
        stack = best_stack(list(placed(glances, headers)), lambda piece: slot is None or _suits(piece, headers, slot))
        factors = _factors(headers, stack.slices, slot)
        lattice = _lattice(stack.slices)
        values = _decoded(paths, headers, stack.slices, factors, lattice, glances, pool)
    used = list(dict.fromkeys(piece.instance for piece in stack.slices))
    place = {number: index for index, number in enumerate(used)}
    source = source_of(
        headers.of(used),
        (paths[number] for number in used),
        (SourceFrame(place[piece.instance], piece.frame_number) for piece in stack.slices),
        instances_of(headers, glances, used),
    )
    grid = _canonical(values, stack.slices, lattice, str(headers.shared(used[0]).get("Modality") or ""))
    return Volume(source, grid, lattice.order, lattice.flipped, stack.left_out)


def _factors(headers: Headers, slices: Sequence[Slice], slot: InputSlot | None) -> dict[int, float]:
    """Return by instance what makes SUVbw of a PET's values, where a model takes PET, else 1."""
    factors = dict.fromkeys((piece.instance for piece in slices), 1.0)
    if slot is not None and "PT" in slot.modality:
        first = first_acquisition(headers)
        for number in factors:
            if headers[number].get("Modality") == "PT":
                factors[number] = suv_factor(headers[number], first)
    return factors


def _suits(piece: Slice, headers: Headers, slot: InputSlot) -> bool:
    header = flat_header(headers[piece.instance], piece.frame_number)
    return not any(True for _ in stack_objections(header, slot))


# -- pixels -------------------------------------------------------------------------------------------------------


def _decoded(
    paths: Sequence[Path],
    headers: Headers,
    slices: Sequence[Slice],
    factors: Mapping[int, float],
    lattice: _Lattice,
    glances: Sequence[Plain | None],
    pool: ThreadPoolExecutor,
) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """Return rescaled values in patient order: int16 where that is exact, else float32."""
    whole = all(piece.fits_int16 for piece in slices) and set(factors.values()) == {1.0}
    shape = (len(slices), *slices[0].shape)
    made: npt.NDArray[Any] = np.empty([shape[axis] for axis in lattice.order], np.int16 if whole else np.float32)
    values = np.transpose(_flip(made, lattice.flipped), np.argsort(lattice.order))  # the same memory in source order
    by_instance: dict[int, list[int]] = defaultdict(list)
    for index, piece in enumerate(slices):
        by_instance[piece.instance].append(index)
    meanings = Meanings(headers, values.dtype)

    def fill(item: tuple[int, list[int]]) -> None:
        number, indices = item
        plain, piece = glances[number], slices[indices[0]]
        if plain is not None and plain.has_codec:
            stored_values = _by_codec(paths[number], plain, headers.shared(number))
            if stored_values is not None:
                values[indices[0]] = scaled(stored_values, piece, headers.shared(number), values.dtype, factors[number])
                return
        elif plain is not None and (meaning := meanings.of(piece, factors[number])) is not None:
            words = plain_words(paths[number], plain, piece.shape)
            if words is not None:
                meaning.write(words, values[indices[0]])
                return
        frames = [slices[index].frame_number - 1 for index in indices]
        if int(headers[number].get("SamplesPerPixel") or 1) != 1:
            raise NotApplicable(Reason.WRONG_IMAGE_TYPE, "colour images are no volume")
        for index, stored in zip(indices, decoded(paths[number], headers[number], frames), strict=True):
            values[index] = scaled(stored, slices[index], headers[number], values.dtype, factors[number])

    # two threads that decode only wait for one another, at twice the price, where a decoder keeps the interpreter
    is_alone = {number: _is_alone(glances[number], headers, number) for number in by_instance}
    together = [item for item in by_instance.items() if not is_alone[item[0]]]
    list(pool.map(fill, [(number, part) for number, indices in together for part in _parts(indices)]))
    for item in by_instance.items():
        if is_alone[item[0]]:
            fill(item)
    return made


def _by_codec(path: Path, plain: Plain, header: Dataset) -> npt.NDArray[Any] | None:
    """Return the stored values of an image by a scan of it and a header that says the same; None where that fails."""
    frame = plain_frame(path, plain)
    if frame is None:
        return None
    require_plausible_frame(frame, header)
    stored_values = values_of([frame], header)
    return None if stored_values is None else stored_values[0]


def _is_alone(plain: Plain | None, headers: Headers, number: int) -> bool:
    """Return whether other threads wait while the pixels of an image are decoded."""
    return not lets_others_run(headers[number]) if plain is None else plain.is_packed


def _parts(indices: list[int]) -> Iterator[list[int]]:
    """Yield the frames of one object in parts for several threads."""
    for start in range(0, len(indices), _TOGETHER):
        yield indices[start : start + _TOGETHER]


# -- geometry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Lattice:
    """How the axes of a stack (frames, rows, columns) become those of the patient: see Volume."""

    directions: npt.NDArray[np.float64]
    order: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]


def _lattice(slices: Sequence[Slice]) -> _Lattice:
    """Name each axis of the source after the patient axis nearest to it."""
    first = slices[0]
    rows_run, columns_run = np.array(first.orientation[3:]), np.array(first.orientation[:3])
    directions = np.stack([first.normal, rows_run, columns_run])  # of the source axes: frames, rows, columns
    order = _nearest(directions)
    flipped = tuple(bool(directions[axis] @ _AXES[n] < 0) for n, axis in enumerate(order))
    return _Lattice(directions, order, (flipped[0], flipped[1], flipped[2]))


def _canonical(values: npt.NDArray[Any], slices: Sequence[Slice], lattice: _Lattice, modality: str) -> Grid:
    """Return values in patient order with the places of their planes."""
    first, order, flipped = slices[0], lattice.order, lattice.flipped
    stack = order.index(0)
    positions = np.array([piece.position for piece in slices])
    along = positions @ first.normal
    origins = positions + _corner(first, order, flipped)
    gap = float(np.median(np.diff(along))) if len(slices) > 1 else first.thickness or 1.0
    spacing = (gap, *first.spacing)
    thickness = _thickness(along, gap)
    if flipped[stack]:
        along, origins, thickness = -along[::-1], origins[::-1], thickness[::-1]
    return Grid(
        values=values,
        spacing=(spacing[order[0]], spacing[order[1]], spacing[order[2]]),
        stack=stack,
        positions=along,
        thickness=thickness,
        directions=np.array([lattice.directions[axis] * (-1 if flipped[n] else 1) for n, axis in enumerate(order)]),
        origins=origins,
        modality=modality,
    )


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


def _corner(first: Slice, order: Sequence[int], flipped: Sequence[bool]) -> npt.NDArray[np.float64]:
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
