"""The node's own look at its results before anybody else gets them: do they parse, fit together and fit the source?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.datadict import tag_for_keyword
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_sequence_item

from dicom_node.elements import UNDEFINED_LENGTH, NotUnderstood
from dicom_node.errors import ResultRefused
from dicom_node.items import Found, items_of
from dicom_node.plane import in_image
from dicom_node.source import Source, flat

Written = bytes | memoryview | Path
"""A result as a Part 10 file: its bytes, or where it lies."""

_SAME_AS_SOURCE = ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber")
_ELSEWHERE = frozenset(
    # sequences that may name objects which the node does not hold: earlier reports, and what the source said itself
    int(tag_for_keyword(keyword) or 0)
    for keyword in (
        "PredecessorDocumentsSequence",
        "ReferencedStudySequence",
        "ReferencedPatientSequence",
        "ReferencedPerformedProcedureStepSequence",
        "ReferencedRequestSequence",
        "RequestAttributesSequence",
    )
)
_CLASS, _INSTANCE, _FRAME, _SEGMENT, _STUDIES, _FRAMES = (
    int(tag_for_keyword(keyword) or 0)
    for keyword in (
        *("ReferencedSOPClassUID", "ReferencedSOPInstanceUID", "ReferencedFrameNumber", "ReferencedSegmentNumber"),
        *("RTReferencedSeriesSequence", "PerFrameFunctionalGroupsSequence"),
    )
)
_WANTED = frozenset({_CLASS, _INSTANCE, _FRAME, _SEGMENT, _STUDIES})  # an item with the last one names a study
_PIXEL_HEAD = 12  # bytes: tag, VR and length
_ITEM, _SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
_BITS_IN_A_BYTE = 8
_ROUNDING = 0.01  # pixels; coordinates are written with three decimals
_OFF_PLANE = 0.05  # mm


@dataclass(frozen=True, slots=True)
class _Reference:
    """What an item says of another object: UIDs, frames and segments as they are written."""

    sop_class_uid: bytes
    sop_instance_uid: bytes
    frames: bytes
    segments: bytes


@dataclass(frozen=True, slots=True)
class _Result:
    """A result as it was read back: its header, and what was counted in the rest of it."""

    dataset: Dataset
    references: frozenset[_Reference]
    groups: int  # functional groups of frames
    segments_of_frames: frozenset[int]
    pixel_bytes: int
    fragments: int  # after the offset table; run-length encoding has one a frame (PS3.5 G.2)


@dataclass(frozen=True, slots=True)
class _Held:
    """An object that may be referred to."""

    sop_class_uid: str
    frames: int
    segments: frozenset[int]
    header: Callable[[], Dataset]


_Known = Mapping[str, _Held]


def require_sound(contents: Sequence[Written], source: Source) -> None:
    """Raise ResultRefused with everything that is wrong with the encoded results of one series."""
    if problems := list(problems_of(contents, source)):
        raise ResultRefused("the results failed the node's own check: " + "; ".join(problems[:5]))


def problems_of(contents: Sequence[Written], source: Source) -> Iterator[str]:
    """Yield one sentence for each thing that is wrong; nothing where all is well. No values of the patient's.

    Of pixels only the length is looked at, so a large object costs no more memory than its header.
    """
    results = []
    for content in contents:
        try:
            with content.open("rb") if isinstance(content, Path) else BytesIO(content) as file:
                results.append(_read_back(file))
        except Exception as error:
            # pydicom answers a broken file with whatever exception comes first
            yield f"an object cannot be read back: {type(error).__name__}"
    known = {**_sources(source), **{str(each.dataset.SOPInstanceUID): _held(each.dataset) for each in results}}
    for result in results:
        name = str(result.dataset.get("Modality"))
        yield from (f"{name}: {problem}" for problem in _identity(result.dataset, source.datasets[0]))
        yield from (f"{name}: {problem}" for problem in (*_references(result, known), *_frames(result)))
        for check in (_coordinates, _graphics, _outlines):
            yield from (f"{name}: {problem}" for problem in check(result.dataset, known))


def _sources(source: Source) -> dict[str, _Held]:
    models: dict[int, tuple[str, int]] = {}
    held = {}
    for number, instance in enumerate(source.instances):
        if instance.like not in models:
            model = source.datasets[instance.like]
            models[instance.like] = str(model.SOPClassUID), int(model.get("NumberOfFrames") or 1)
        header = partial(source.datasets.__getitem__, number)
        held[instance.sop_instance_uid] = _Held(*models[instance.like], frozenset(), header)
    return held


def _held(result: Dataset) -> _Held:
    segments = frozenset(int(segment.SegmentNumber) for segment in result.get("SegmentSequence", ()))
    return _Held(str(result.SOPClassUID), int(result.get("NumberOfFrames") or 1), segments, lambda: result)


# -- reading ------------------------------------------------------------------------------------------------------


def _read_back(file: BinaryIO) -> _Result:
    """Read a Part 10 file up to its pixels, and go over those without taking them in."""
    dataset = dcmread(file, stop_before_pixels=True)
    head = file.read(_PIXEL_HEAD)
    length, fragments = (int.from_bytes(head[8:], "little"), 0) if head else (0, 0)
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    if length == UNDEFINED_LENGTH:
        file.seek(start)
        fragments = _fragments(file, end)
    elif start + length != end:
        raise NotUnderstood("the file does not end with its pixels")
    references: set[_Reference] = set()
    segments: set[int] = set()
    groups = 0
    for stored in list(dataset.elements()):  # as they were read: going over the dataset would parse every value
        if stored.VR != "SQ" or stored.tag in _ELSEWHERE:
            continue
        for found in items_of(_encoded(stored), _WANTED, _ELSEWHERE):
            references.update(_reference(item) for item in found if _INSTANCE in item and _STUDIES not in item)
            if stored.tag == _FRAMES:
                groups += 1
                segments.update(_short(item[_SEGMENT]) for item in found if _SEGMENT in item and _INSTANCE not in item)
    return _Result(dataset, frozenset(references), groups, frozenset(segments), length, fragments)


def _encoded(stored: Any) -> bytes:
    """Return the bytes of a sequence; one of undefined length has been parsed on the way, and is written again."""
    if stored.is_raw:
        return bytes(stored.value or b"")
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    for item in stored.value:
        write_sequence_item(buffer, item, ["utf-8"])
    return buffer.getvalue()


def _fragments(file: BinaryIO, end: int) -> int:
    """Return how many fragments follow the offset table, to the end of the file."""
    count = -1
    while len(head := file.read(8)) == 8:
        at = file.seek(int.from_bytes(head[4:], "little"), os.SEEK_CUR)
        if head == _SEQUENCE_END and at == end:
            return count
        if head[:4] != _ITEM or at > end:
            break
        count += 1
    raise NotUnderstood("encapsulated pixels are not made of items")


def _reference(item: Found) -> _Reference:
    return _Reference(item.get(_CLASS, b""), item[_INSTANCE], item.get(_FRAME, b""), item.get(_SEGMENT, b""))


def _short(value: bytes) -> int:
    return int.from_bytes(value[:2], "little")


# -- checks -------------------------------------------------------------------------------------------------------


def _identity(result: Dataset, reference: Dataset) -> Iterator[str]:
    for keyword in _SAME_AS_SOURCE:
        if str(result.get(keyword) or "") != str(reference.get(keyword) or ""):
            yield f"{keyword} is not the source's"


def _references(result: _Result, known: _Known) -> Iterator[str]:
    """Every object that is referred to must be held, be of the class that is said, and have the frame and segment."""
    for reference in result.references:
        target = known.get(_text(reference.sop_instance_uid))
        if target is None:
            yield "refers to an instance that the node does not hold"
        elif _text(reference.sop_class_uid) != target.sop_class_uid:
            yield "refers to an instance by the wrong SOP Class"
        else:
            yield from _inside(reference, target)


def _inside(reference: _Reference, target: _Held) -> Iterator[str]:
    frames = [int(number) for number in _text(reference.frames).split("\\") if number]
    if any(not 1 <= number <= target.frames for number in frames):
        yield "refers to a frame that is not there"
    segments = np.frombuffer(reference.segments, "<u2").tolist()
    if any(number not in target.segments for number in segments):
        yield "refers to a segment that is not there"


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace").strip("\0 ")


def _frames(read: _Result) -> Iterator[str]:
    """Frames, functional groups, segments and bytes must add up (PS3.3 C.7.6.16, C.8.20)."""
    result = read.dataset
    if "PerFrameFunctionalGroupsSequence" not in result:
        return
    frames = int(result.NumberOfFrames)
    if read.groups != frames:
        yield "frames and functional groups differ in number"
    needed = -(-frames * int(result.Rows) * int(result.Columns) * int(result.BitsAllocated) // _BITS_IN_A_BYTE)
    syntax = result.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated and read.pixel_bytes != needed + needed % 2:
        yield "pixel data is not as long as its frames need"
    if syntax.is_encapsulated and read.fragments != frames:
        yield "pixel data has another number of frames than is said"
    numbers = {int(segment.SegmentNumber) for segment in result.get("SegmentSequence", ())}
    if read.segments_of_frames and read.segments_of_frames != numbers:
        yield "segments that are described and segments that have frames differ"


def _coordinates(result: Dataset, known: _Known) -> Iterator[str]:
    """Every point of a region must lie on its image (PS3.3 C.18.6)."""
    for item in _content(result):
        if item.get("ValueType") != "SCOORD":
            continue
        images = [known.get(str(child.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)) for child in _images(item)]
        for image in images:
            if image is not None and not _on(image.header(), [float(value) for value in item.GraphicData]):
                yield "a region lies outside its image"


def _content(dataset: Dataset) -> Iterator[Dataset]:
    """Yield every content item of a document."""
    for item in dataset.get("ContentSequence", ()):
        yield item
        yield from _content(item)


def _graphics(result: Dataset, known: _Known) -> Iterator[str]:
    """Every line and label in pixels must lie on its image (PS3.3 C.10.5)."""
    for annotation in result.get("GraphicAnnotationSequence", ()):
        images = [known.get(str(item.ReferencedSOPInstanceUID)) for item in annotation.ReferencedImageSequence]
        points = [list(item.GraphicData) for item in annotation.get("GraphicObjectSequence", ())]
        points += [
            [*item.BoundingBoxTopLeftHandCorner, *item.BoundingBoxBottomRightHandCorner]
            for item in annotation.get("TextObjectSequence", ())
            if item.get("BoundingBoxAnnotationUnits") == "PIXEL"
        ]
        for image in images:
            if image is not None and not all(_on(image.header(), line) for line in points):
                yield "a line or a label lies outside its image"


def _outlines(result: Dataset, known: _Known) -> Iterator[str]:
    """Every outline in the patient must lie on the plane of its image and within it (PS3.3 C.8.8.6)."""
    for reference in result.get("ReferencedFrameOfReferenceSequence", ()):
        studies = reference.get("RTReferencedStudySequence", ())
        if any(study.ReferencedSOPInstanceUID != result.StudyInstanceUID for study in studies):
            yield "refers to another study"
    for region in result.get("ROIContourSequence", ()):
        for outline in region.get("ContourSequence", ()):
            place = outline.ContourImageSequence[0]
            image = known.get(str(place.ReferencedSOPInstanceUID))
            if image is None:
                continue  # said already
            header = flat(image.header(), int(place.get("ReferencedFrameNumber") or 1))
            points = np.array([float(value) for value in outline.ContourData]).reshape(-1, 3)
            on_image = in_image(points, header)
            if np.abs(on_image[:, 2]).max() > _OFF_PLANE or not _on(image.header(), on_image[:, :2].ravel().tolist()):
                yield "an outline lies outside its image"


def _images(item: Dataset) -> list[Dataset]:
    return [child for child in item.get("ContentSequence", ()) if "ReferencedSOPSequence" in child]


def _on(image: Dataset, points: Sequence[float]) -> bool:
    columns, rows = points[::2], points[1::2]
    return (
        min(columns) >= -_ROUNDING
        and max(columns) <= float(image.Columns) + _ROUNDING
        and min(rows) >= -_ROUNDING
        and max(rows) <= float(image.Rows) + _ROUNDING
    )
