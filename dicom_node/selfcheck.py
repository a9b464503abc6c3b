"""The node's own look at its results before anybody else gets them: do they parse, fit together and fit the source?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO

from pydicom import Dataset, dcmread

from dicom_node.errors import ResultRefused
from dicom_node.source import Source

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
        yield from (f"{name}: {problem}" for problem in _references(result, known))
        yield from (f"{name}: {problem}" for problem in _frames(result))
        yield from (f"{name}: {problem}" for problem in _coordinates(result, known))


def _identity(result: Dataset, reference: Dataset) -> Iterator[str]:
    for keyword in _SAME_AS_SOURCE:
        if str(result.get(keyword) or "") != str(reference.get(keyword) or ""):
            yield f"{keyword} is not the source's"


def _references(result: Dataset, known: Mapping[str, Dataset]) -> Iterator[str]:
    """Every object that is referred to must be held, be of the class that is said, and have the frame and segment."""
    for item in _items(result):
        uid = item.get("ReferencedSOPInstanceUID")
        if uid is None:
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


def _frames(result: Dataset) -> Iterator[str]:
    """Frames, functional groups, segments and bytes must add up (PS3.3 C.7.6.16, C.8.20)."""
    if "PerFrameFunctionalGroupsSequence" not in result:
        return
    frames = int(result.NumberOfFrames)
    if len(result.PerFrameFunctionalGroupsSequence) != frames:
        yield "frames and functional groups differ in number"
    bits = frames * int(result.Rows) * int(result.Columns) * int(result.BitsAllocated)
    needed = -(-bits // _BITS_IN_A_BYTE)
    if not result.file_meta.TransferSyntaxUID.is_compressed and len(result.PixelData) != needed + needed % 2:
        yield "pixel data is not as long as its frames need"
    numbers = {int(segment.SegmentNumber) for segment in result.SegmentSequence}
    used = {
        int(frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        for frame in result.PerFrameFunctionalGroupsSequence
        if "SegmentIdentificationSequence" in frame
    }
    if used and used != numbers:
        yield "segments that are described and segments that have frames differ"


def _coordinates(result: Dataset, known: Mapping[str, Dataset]) -> Iterator[str]:
    """Every point of a region must lie on its image (PS3.3 C.18.6)."""
    for item in _items(result):
        if item.get("ValueType") != "SCOORD":
            continue
        images = [known.get(str(child.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)) for child in _images(item)]
        for image in images:
            if image is not None and not _on(image, [float(value) for value in item.GraphicData]):
                yield "a region lies outside its image"


def _images(item: Dataset) -> list[Dataset]:
    return [child for child in item.get("ContentSequence", ()) if "ReferencedSOPSequence" in child]


def _on(image: Dataset, points: Sequence[float]) -> bool:
    columns, rows = points[::2], points[1::2]
    return (
        min(columns) >= 0 and max(columns) <= float(image.Columns) and min(rows) >= 0 and max(rows) <= float(image.Rows)
    )


def _items(dataset: Dataset) -> Iterator[Dataset]:
    """Yield every item of every sequence at any depth that speaks of objects the node must hold."""
    for element in dataset:
        if element.VR == "SQ" and element.keyword not in _ELSEWHERE:
            for item in element.value:
                yield item
                yield from _items(item)
