"""The node's own look at its results before anybody else gets them: do they parse, fit together and fit the source?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.encaps import parse_basic_offsets, parse_fragments

from dicom_node.errors import ResultRefused
from dicom_node.plane import in_image
from dicom_node.source import Source, flat

_SAME_AS_SOURCE = ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber")
_ELSEWHERE = frozenset(
    # sequences that may name objects which the node does not hold: earlier reports, and what the source said itself
    {
        "PredecessorDocumentsSequence",
        "ReferencedStudySequence",
        "ReferencedPatientSequence",
        "ReferencedPerformedProcedureStepSequence",
        "ReferencedRequestSequence",
        "RequestAttributesSequence",
    }
)
_BITS_IN_A_BYTE = 8
_ROUNDING = 0.01  # pixels; coordinates are written with three decimals
_OFF_PLANE = 0.05  # mm


def require_sound(contents: Sequence[bytes | memoryview], source: Source) -> None:
    """Raise ResultRefused with everything that is wrong with the encoded results of one series."""
    if problems := list(problems_of(contents, source)):
        raise ResultRefused("the results failed the node's own check: " + "; ".join(problems[:5]))


def problems_of(contents: Sequence[bytes | memoryview], source: Source) -> Iterator[str]:
    """Yield one sentence for each thing that is wrong; nothing where all is well. No values of the patient's."""
    results = []
    for content in contents:
        try:
            results.append(dcmread(BytesIO(content)))
        except Exception as error:
            # pydicom answers a broken file with whatever exception comes first
            yield f"an object cannot be read back: {type(error).__name__}"
    known = {str(dataset.SOPInstanceUID): dataset for dataset in (*source.datasets, *results)}
    for result in results:
        name = str(result.get("Modality"))
        yield from (f"{name}: {problem}" for problem in _identity(result, source.datasets[0]))
        for check in (_references, _frames, _coordinates, _graphics, _outlines):
            yield from (f"{name}: {problem}" for problem in check(result, known))


def _identity(result: Dataset, reference: Dataset) -> Iterator[str]:
    for keyword in _SAME_AS_SOURCE:
        if str(result.get(keyword) or "") != str(reference.get(keyword) or ""):
            yield f"{keyword} is not the source's"


def _references(result: Dataset, known: Mapping[str, Dataset]) -> Iterator[str]:
    """Every object that is referred to must be held, be of the class that is said, and have the frame and segment."""
    for item in _items(result):
        uid = item.get("ReferencedSOPInstanceUID")
        if uid is None or "RTReferencedSeriesSequence" in item:  # the latter names the study, see _outlines
            continue
        target = known.get(str(uid))
        if target is None:
            yield "refers to an instance that the node does not hold"
        elif item.get("ReferencedSOPClassUID") != target.SOPClassUID:
            yield "refers to an instance by the wrong SOP Class"
        else:
            yield from _inside(item, target)


def _inside(item: Dataset, target: Dataset) -> Iterator[str]:
    frames = int(target.get("NumberOfFrames") or 1)
    if any(not 1 <= int(number) <= frames for number in _numbers(item, "ReferencedFrameNumber")):
        yield "refers to a frame that is not there"
    segments = {int(segment.SegmentNumber) for segment in target.get("SegmentSequence", ())}
    if any(int(number) not in segments for number in _numbers(item, "ReferencedSegmentNumber")):
        yield "refers to a segment that is not there"


def _numbers(item: Dataset, keyword: str) -> list[int]:
    value = item.get(keyword)
    if value is None:
        return []
    return (
        [int(number) for number in value] if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]
    )


def _frames(result: Dataset, _known: Mapping[str, Dataset]) -> Iterator[str]:
    """Frames, functional groups, segments and bytes must add up (PS3.3 C.7.6.16, C.8.20)."""
    if "PerFrameFunctionalGroupsSequence" not in result:
        return
    frames = int(result.NumberOfFrames)
    if len(result.PerFrameFunctionalGroupsSequence) != frames:
        yield "frames and functional groups differ in number"
    bits = frames * int(result.Rows) * int(result.Columns) * int(result.BitsAllocated)
    needed = -(-bits // _BITS_IN_A_BYTE)
    pixels = result.get("PixelData", result.get("FloatPixelData", b""))
    if not result.file_meta.TransferSyntaxUID.is_compressed and len(pixels) != needed + needed % 2:
        yield "pixel data is not as long as its frames need"
    if result.file_meta.TransferSyntaxUID.is_encapsulated and _fragments(pixels) != frames:
        yield "pixel data has another number of frames than is said"
    numbers = {int(segment.SegmentNumber) for segment in result.get("SegmentSequence", ())}
    used = {
        int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for frame in result.PerFrameFunctionalGroupsSequence
        if "SegmentIdentificationSequence" in frame
    }
    if used and used != numbers:
        yield "segments that are described and segments that have frames differ"


def _fragments(pixels: bytes) -> int:
    """Return how many fragments follow the offset table; run-length encoding has one a frame (PS3.5 G.2)."""
    buffer = BytesIO(pixels)
    parse_basic_offsets(buffer)
    return parse_fragments(buffer)[0]


def _coordinates(result: Dataset, known: Mapping[str, Dataset]) -> Iterator[str]:
    """Every point of a region must lie on its image (PS3.3 C.18.6)."""
    if "ContentSequence" not in result:
        return
    for item in _items(result):
        if item.get("ValueType") != "SCOORD":
            continue
        images = [known.get(str(child.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)) for child in _images(item)]
        for image in images:
            if image is not None and not _on(image, [float(value) for value in item.GraphicData]):
                yield "a region lies outside its image"


def _graphics(result: Dataset, known: Mapping[str, Dataset]) -> Iterator[str]:
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
            if image is not None and not all(_on(image, line) for line in points):
                yield "a line or a label lies outside its image"


def _outlines(result: Dataset, known: Mapping[str, Dataset]) -> Iterator[str]:
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
            header = flat(image, int(place.get("ReferencedFrameNumber") or 1))
            points = np.array([float(value) for value in outline.ContourData]).reshape(-1, 3)
            on_image = in_image(points, header)
            if np.abs(on_image[:, 2]).max() > _OFF_PLANE or not _on(image, on_image[:, :2].ravel().tolist()):
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


def _items(dataset: Dataset) -> Iterator[Dataset]:
    """Yield every item of every sequence at any depth that speaks of objects the node must hold."""
    for stored in list(dataset.elements()):  # as they were read: going over the dataset would parse every value
        if stored.VR not in ("SQ", None):
            continue
        element = dataset[stored.tag]
        if element.VR == "SQ" and element.keyword not in _ELSEWHERE:
            for item in element.value:
                yield item
                yield from _items(item)
