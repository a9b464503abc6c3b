"""A segmentation of many planes: highdicom says everything that is the same for all of them, the rest is written here.

What highdicom spends most of its time on, an object for every frame, is the same item over and over: it is encoded
once and filled in with the place, the source image and the segment of each frame.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from highdicom.spatial import get_normal_vector, get_volume_positions
from pydicom import DataElement, Dataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.uid import RLELossless
from pydicom.valuerep import DS, format_number_as_ds

from dicom_node.findings import Segment
from dicom_node.results.header import Headers
from dicom_node.results.layers import Labels, Planes, numbers
from dicom_node.results.packing import Extent, bits, fragments, run_lengths, size_of_bits
from dicom_node.results.pieces import Pixels
from dicom_node.results.template import Template, leave_encoded, sequence, text, uid
from dicom_node.source import Instance

Seed = Callable[[Sequence[Dataset], Labels], Dataset]
"""Makes a segmentation of a few images and as many planes of Segment Numbers."""

_FRAMES = "PerFrameFunctionalGroupsSequence"
_MANY = 3  # planes; with fewer there is nothing to gain
_VARYING = ("DimensionIndexValues", "ImagePositionPatient", "ReferencedSOPInstanceUID", "ReferencedSegmentNumber")


def is_series_of_planes(headers: Headers) -> bool:
    """Return whether each image is one plane in the patient, of one class, size and direction.

    The source's own headers are looked at, for none has to be made ready for that. Ready, all have the direction of the
    first (`Images`), and a frame of reference of the same name where none states one.
    """
    if len(headers.instances) < _MANY or not headers.images[0].get("ImageOrientationPatient"):
        return False
    different = {_sameness(headers.images.original(number)) for number in {each.like for each in headers.instances}}
    return len(different) == 1 and None not in different


def _sameness(image: Dataset) -> tuple[str, ...] | None:
    """Return what must be the same in all; None where that is not stated, or there is no place or more than a frame."""
    stated = tuple(str(image.get(keyword) or "") for keyword in ("SOPClassUID", "Rows", "Columns"))
    is_plane = "ImagePositionPatient" in image and str(image.get("NumberOfFrames") or 1) == "1"
    return (*stated, str(image.get("FrameOfReferenceUID") or "")) if is_plane and all(stated) else None


_NOWHERE = Extent(0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Frame:
    """One frame: which plane of the labels, its number among those that are used (from 1), value and Segment Number."""

    plane: int
    place: int
    value: int = 0
    number: int = 0
    extent: Extent = _NOWHERE


def of_planes(planes: Planes, segments: Sequence[Segment], headers: Headers, seed: Seed) -> Dataset:
    """Return a segmentation as `seed` makes it of a few images, with the frames of all.

    There is one plane for each image. Frames are in the order of their segments, then of their places along
    the images' normal; those without a pixel are left out.
    """
    images, instances = headers.images, headers.instances
    positions = np.array([[float(value) for value in instance.position] for instance in instances])
    order = _order(positions, images[0])
    labels, contents = planes.labels, planes.contents
    values = {segment.value for segment in segments}
    used = [plane for plane in order if values & contents[plane].keys()]
    if not used or len(order) < len(images):
        return seed(images, planes.numbered(segments))
    few = np.zeros((2, *labels.shape[1:]), np.uint8)
    few[0, 0, 0] = 1
    seeded = seed(images[:2], few)
    made = Dataset()
    made.update(seeded)
    made.file_meta = seeded.file_meta
    correct_ambiguous_vr(made, True)
    if made.SegmentationType == "LABELMAP":
        frames = [_Frame(plane, place) for place, plane in enumerate(used, start=1)]
        table = numbers(labels, segments)
        items = fragments([run_lengths(labels[frame.plane], table) for frame in frames])
        pixels = Pixels(lambda: items, sum(map(len, items)))
        made.file_meta.TransferSyntaxUID = RLELossless
    else:
        frames = list(_frames(contents, segments, used))
        pixels = _bits(labels, frames)
    made["PixelData"] = DataElement("PixelData", "OB", pixels)
    made.NumberOfFrames = len(frames)
    item = Template(seeded.PerFrameFunctionalGroupsSequence[0], _VARYING)
    made[_FRAMES] = sequence(_FRAMES, _items(item, frames, instances))
    _refer(made, instances)
    is_one_a_place = made.SegmentationType == "LABELMAP" or len(segments) == 1
    _say_spacing(made, images[0], positions, sorted(used) if is_one_a_place else [])
    return made


def compress(label_map: Dataset) -> None:
    """Put the frames of a label map into run lengths, where they are not: GDCM ends the process over odd frames."""
    if label_map.file_meta.TransferSyntaxUID == RLELossless:
        return
    dtype = f"<u{label_map.BitsAllocated // 8}"
    shape = (int(label_map.NumberOfFrames), label_map.Rows, label_map.Columns)
    labels = np.frombuffer(label_map.PixelData, dtype, count=math.prod(shape)).reshape(shape)
    label_map.PixelData = encapsulate([run_lengths(plane) for plane in labels])
    label_map.file_meta.TransferSyntaxUID = RLELossless


def _order(positions: npt.NDArray[np.float64], image: Dataset) -> list[int]:
    """Return the planes in the order of their places; of several at one place the first."""
    orientation = [float(value) for value in image.ImageOrientationPatient]
    along = positions @ get_normal_vector(orientation, index_convention="DR")
    return [int(plane) for plane in np.unique(along, return_index=True)[1]]


def _frames(
    contents: Sequence[dict[int, Extent]], segments: Sequence[Segment], used: Sequence[int]
) -> Iterator[_Frame]:
    for number, segment in enumerate(segments, start=1):
        for place, plane in enumerate(used, start=1):
            if segment.value in contents[plane]:
                yield _Frame(plane, place, segment.value, number, contents[plane][segment.value])


def _bits(labels: Labels, frames: Sequence[_Frame]) -> Pixels:
    """Return pixel data that is packed when it is written: thousands of frames of a few structures fill gigabytes."""
    shape = labels.shape[1], labels.shape[2]
    size = size_of_bits(len(frames), shape)

    def packed() -> Iterator[bytes]:
        yield from bits(((labels[frame.plane], frame.value, frame.extent) for frame in frames), shape)
        yield bytes(size % 2)

    return Pixels(packed, size + size % 2)


def _items(item: Template, frames: Sequence[_Frame], instances: Sequence[Instance]) -> Iterator[bytes]:
    """Yield the functional groups of each frame; the order of indices is that of DimensionIndexSequence."""
    planes = {frame.plane for frame in frames}
    positions = {plane: _position(instances[plane]) for plane in planes}
    uids = {plane: uid(instances[plane].sop_instance_uid) for plane in planes}
    for frame in frames:
        indices = (frame.number, frame.place) if frame.number else (frame.place,)
        yield item.filled(
            {
                "DimensionIndexValues": struct.pack(f"<{len(indices)}L", *indices),
                "ImagePositionPatient": positions[frame.plane],
                "ReferencedSOPInstanceUID": uids[frame.plane],
                "ReferencedSegmentNumber": struct.pack("<H", frame.number),
            }
        )


def _position(instance: Instance) -> bytes:
    """Return a position as it was written, where it is a valid Decimal String, else rounded to be one."""
    return text("\\".join(str(DS(value, auto_format=True)) for value in instance.position))


def _refer(made: Dataset, instances: Sequence[Instance]) -> None:
    """Refer to all images, where the seed refers to a few (PS3.3 C.7.6.1, C.12.2)."""
    item = Template(made.SourceImageSequence[0], ["ReferencedSOPInstanceUID"])
    items = [item.filled({"ReferencedSOPInstanceUID": uid(each.sop_instance_uid)}) for each in instances]
    made["SourceImageSequence"] = sequence("SourceImageSequence", items)
    series = made.ReferencedSeriesSequence[0]
    series["ReferencedInstanceSequence"] = sequence("ReferencedInstanceSequence", items)
    leave_encoded(series)


def _say_spacing(made: Dataset, image: Dataset, positions: npt.NDArray[np.float64], one_a_place: Sequence[int]) -> None:
    """Say how far slices are apart, and whether frames `one_a_place` are a volume, as highdicom does."""
    orientation = [float(value) for value in image.ImageOrientationPatient]
    measures = made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if "SpacingBetweenSlices" not in image:
        measures.pop("SpacingBetweenSlices", None)
        spacing, _ = get_volume_positions(positions.tolist(), orientation)
        if spacing is not None:
            measures.SpacingBetweenSlices = format_number_as_ds(spacing)
    if len(one_a_place) > 1:
        spacing, _ = get_volume_positions(positions[list(one_a_place)].tolist(), orientation, sort=False)
        if spacing is not None and spacing > 0:
            made.DimensionOrganizationType = "3D"
