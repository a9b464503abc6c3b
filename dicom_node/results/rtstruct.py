"""Outlines as an RT Structure Set (PS3.3 A.19), for those who plan radiotherapy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

from dicom_node.findings import Segment
from dicom_node.plane import in_patient
from dicom_node.results import Work
from dicom_node.results.contours import Contour, contours
from dicom_node.results.header import complete, contributing_equipment

_SERIES_OFFSET = 20
_STUDY_COMPONENT = "1.2.840.10008.3.1.2.3.1"  # Detached Study Management, retired; what the IOD still asks for


def encode(work: Work) -> Sequence[Dataset]:
    """Return one structure set with a region for each segment; none for images without a place in the patient."""
    image = work.headers.images[0]
    if not work.findings.segments or "FrameOfReferenceUID" not in image:
        return []
    context = work.context
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SOPClassUID = RTStructureSetStorage
    made.SOPInstanceUID = context.uid("rtstruct")
    made.StudyInstanceUID = image.StudyInstanceUID
    made.SeriesInstanceUID = context.uid("rtstruct series")
    made.Modality = "RTSTRUCT"
    made.InstanceNumber = 1
    made.OperatorsName = None  # type 2: no person made it
    made.FrameOfReferenceUID = image.FrameOfReferenceUID
    made.PositionReferenceIndicator = None
    made.StructureSetLabel = context.content_label
    made.StructureSetName = context.series_description()
    made.StructureSetDescription = context.disclaimer
    made.ApprovalStatus = "UNAPPROVED"
    made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(work)]
    segments = list(enumerate(work.findings.segments, start=1))
    made.StructureSetROISequence = [_region(number, segment, work) for number, segment in segments]
    made.ROIContourSequence = [_outlines(number, segment, work) for number, segment in segments]
    made.RTROIObservationsSequence = [_observation(number, segment) for number, segment in segments]
    made.ContributingEquipmentSequence = contributing_equipment(context)
    complete(made, work.headers, context, series_offset=_SERIES_OFFSET)
    made.StructureSetDate, made.StructureSetTime = made.SeriesDate, made.SeriesTime
    return [made]


def _frame_of_reference(work: Work) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = work.headers.images[0].SeriesInstanceUID
    series.ContourImageSequence = [_reference(frame, work) for frame in dict.fromkeys(_one_each(work))]
    study = Dataset()
    study.ReferencedSOPClassUID = _STUDY_COMPONENT
    study.ReferencedSOPInstanceUID = work.headers.images[0].StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    item = Dataset()
    item.FrameOfReferenceUID = work.headers.images[0].FrameOfReferenceUID
    item.RTReferencedStudySequence = [study]
    return item


def _one_each(work: Work) -> Iterator[int]:
    """Yield the first frame of each instance."""
    seen: set[int] = set()
    for frame, place in enumerate(work.source.frames):
        if place.instance not in seen:
            seen.add(place.instance)
            yield frame


def _reference(frame: int, work: Work, *, with_frame: bool = False) -> Dataset:
    place = work.source.frames[frame]
    image = work.source.datasets[place.instance]
    item = Dataset()
    item.ReferencedSOPClassUID = image.SOPClassUID
    item.ReferencedSOPInstanceUID = image.SOPInstanceUID
    if with_frame and int(image.get("NumberOfFrames") or 1) > 1:
        item.ReferencedFrameNumber = place.frame_number
    return item


def _region(number: int, segment: Segment, work: Work) -> Dataset:
    item = Dataset()
    item.ROINumber = number
    item.ReferencedFrameOfReferenceUID = work.headers.images[0].FrameOfReferenceUID
    item.ROIName = segment.label[:64]
    item.ROIGenerationAlgorithm = "AUTOMATIC"
    item.ROIGenerationDescription = f"{work.context.model.name} {work.context.model.version}"[:64]
    return item


def _outlines(number: int, segment: Segment, work: Work) -> Dataset:
    item = Dataset()
    item.ReferencedROINumber = number
    item.ROIDisplayColor = list(segment.colour)
    item.ContourSequence = []
    mask = work.findings.labels[segment.layer] == segment.value
    for frame in np.flatnonzero(mask.any(axis=(1, 2))).tolist():
        for contour in contours(mask[frame]):
            item.ContourSequence.append(_contour(contour, frame, work))
    return item


def _contour(contour: Contour, frame: int, work: Work) -> Dataset:
    points = in_patient(contour[:-1], work.source.header_of(frame))
    item = Dataset()
    item.ContourImageSequence = [_reference(frame, work, with_frame=True)]
    item.ContourGeometricType = "CLOSED_PLANAR"
    item.NumberOfContourPoints = len(points)
    item.ContourData = [f"{value:.3f}" for value in points.ravel().tolist()]
    return item


def _observation(number: int, segment: Segment) -> Dataset:
    item = Dataset()
    item.ObservationNumber = number
    item.ReferencedROINumber = number
    item.ROIObservationLabel = segment.label[:16]
    item.RTROIInterpretedType = "ORGAN" if segment.category.value == "123037004" else ""
    item.ROIInterpreter = None
    return item
