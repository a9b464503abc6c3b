"""Findings and measurements as a Comprehensive 3D SR, TID 1500 (PS3.16).

Every group has coordinates, or a sibling with the same tracking UID that has: one widespread viewer loses the
whole report over a group without. A box therefore comes as a TID 1410 group that draws and a TID 1411 group that
measures, both with the tracking UID of the SEG's segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from highdicom import sr
from pydicom import Dataset
from pydicom.sr.coding import Code as PydicomCode

from dicom_node.findings import Answer, Box, Code, Finding, Findings, Measurement, Segment
from dicom_node.labelling import Context, Predecessor
from dicom_node.results import Work
from dicom_node.results.evidence import refer_to_all, shown
from dicom_node.results.header import (
    ARTIFICIAL_INTELLIGENCE,
    algorithm_parameters,
    code,
    complete,
    made_by,
    observer,
    put,
)
from dicom_node.results.layers import Layers
from dicom_node.results.template import encode_items, leave_encoded
from dicom_node.source import Source, flat

_SERIES_OFFSET = 10
_BOUNDED_BY = PydicomCode("75958009", "SCT", "Bounded by")
_CERTAINTY = PydicomCode("111012", "DCM", "Certainty of Finding")
_PERCENT = PydicomCode("%", "UCUM", "Percent")
_PRESENCE = PydicomCode("121052", "DCM", "Presence of property")
_ABSENT = PydicomCode("272519000", "SCT", "Absent")
_ENGLISH = sr.CodedConcept("en-US", "RFC5646", "English (United States)")
_IMAGING_MEASUREMENT_REPORT = PydicomCode("126000", "DCM", "Imaging Measurement Report")
_PROCEDURES = {
    # what was imaged, not what was computed (CID 100)
    "CT": PydicomCode("25045-6", "LN", "CT unspecified body region"),
    "MR": PydicomCode("25056-3", "LN", "MRI unspecified body region"),
    "PT": PydicomCode("44136-0", "LN", "PET unspecified body region"),
    "NM": PydicomCode("49118-3", "LN", "NM unspecified body region"),
    "CR": PydicomCode("43468-8", "LN", "XR unspecified body region"),
    "DX": PydicomCode("43468-8", "LN", "XR unspecified body region"),
}
_ANY_PROCEDURE = PydicomCode("363679005", "SCT", "Imaging procedure")


def encode(work: Work) -> Sequence[Dataset]:
    """Return a report of what was found, one of what was looked for and not found, one of what was answered.

    Where the model could answer only a part of its question, all are PARTIAL and say what is missing.
    """
    findings, source, context = work.findings, work.source, work.context
    segmentations = list(work.made.get("seg", ()))
    reports = []
    groups, key_frames = _groups(findings, source, context, segmentations, work.layers)
    if groups:
        reports.append(_report(0, groups, key_frames, segmentations, work))
    # groups without coordinates must not stand in a report with groups that have: see the top of the file
    without_places = (
        _absences(findings, context),
        [_answered(answer, findings, context) for answer in findings.answers],
    )
    for ordinal, made in enumerate(without_places, start=1):
        if made:
            reports.append(_report(ordinal, made, [len(source.frames) // 2], [], work))
    return reports


def _report(
    ordinal: int, groups: Sequence[Any], key_frames: Sequence[int], segmentations: Sequence[Dataset], work: Work
) -> Dataset:
    """Return one document; its evidence has the images first: a viewer takes the first series for the image's."""
    source, headers, context = work.source, work.headers, work.context
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer(context)),
        procedure_reported=_PROCEDURES.get(str(headers.images[0].get("Modality")), _ANY_PROCEDURE),
        imaging_measurements=groups,
        title=_IMAGING_MEASUREMENT_REPORT,
        language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(_ENGLISH),
        referenced_images=_library(key_frames, source, headers.images),
    )[0]
    seeded = sr.Comprehensive3DSR(
        evidence=[*shown(headers, (source.frames[frame].instance for frame in key_frames)), *segmentations],
        content=_beginning(content),
        series_instance_uid=context.uid("sr series", ordinal),
        series_number=context.series_number,
        sop_instance_uid=context.uid("sr", ordinal),
        is_complete=not work.findings.incomplete,
        is_final=False,
        is_verified=False,
        previous_versions=[_predecessor(earlier, headers.images[0]) for earlier in context.predecessors] or None,
        **made_by(context),
    )
    report = Dataset()
    report.update(seeded)
    report.file_meta = seeded.file_meta
    report["ContentSequence"] = content["ContentSequence"]
    refer_to_all(report, headers)
    if work.findings.incomplete:
        report.CompletionFlagDescription = "; ".join(work.findings.incomplete)[:64]
    complete(report, headers, context, series_offset=_SERIES_OFFSET + ordinal)
    encode_items(report, "ContentSequence")
    leave_encoded(report)
    return report


def _beginning(content: Dataset) -> Dataset:
    """Return a document's content with its first item alone: highdicom would copy, and go through, all of it."""
    beginning = Dataset()
    beginning.update(content)
    put(beginning, "ContentSequence", content.ContentSequence[:1])
    return beginning


# -- groups -------------------------------------------------------------------------------------------------------


def _groups(
    findings: Findings, source: Source, context: Context, segmentations: Sequence[Dataset], layers: Layers
) -> tuple[list[Any], list[int]]:
    """Return the measurement groups, and the frames that they draw on."""
    groups: list[Any] = []
    frames: list[int] = []
    for finding in findings.findings:
        groups.extend(_finding_groups(finding, findings, source, context, segmentations))
        frames.append(finding.box.frame)
    outlined = {finding.segment for finding in findings.findings}
    for number, segment in enumerate(findings.segments):
        if number not in outlined:
            box = layers.box_of(segment)
            groups.extend(_segment_groups(segment, box, findings, source, context, segmentations))
            frames.append(box.frame)
    return groups, frames


def _absences(findings: Findings, context: Context) -> list[Any]:
    """Return a group for everything that was looked for and not found."""
    found = {finding.finding for finding in findings.findings}
    return [_absent(looked_for, findings, context) for looked_for in findings.looked_for if looked_for not in found]


def _finding_groups(
    finding: Finding, findings: Findings, source: Source, context: Context, segmentations: Sequence[Dataset]
) -> list[Any]:
    numbers = [_certainty(finding, findings, context), *_measured(finding.measurements, findings, context)]
    about = {
        "finding_type": code(finding.finding),
        "finding_category": code(finding.category),
        "finding_sites": _sites(finding.site, finding.laterality),
        "algorithm_id": _algorithm(findings, context),
    }
    if finding.segment is None or not segmentations:
        group = _planar(finding.box, finding, source, about, numbers)
        _infer_from_region(group)
        return [group]
    segment = findings.segments[finding.segment]
    return [
        _planar(finding.box, finding, source, about, None),
        _volumetric(segment, finding, source, segmentations, about, numbers),
    ]


def _segment_groups(
    segment: Segment,
    box: Box,
    findings: Findings,
    source: Source,
    context: Context,
    segmentations: Sequence[Dataset],
) -> list[Any]:
    about = {
        "finding_type": code(segment.type),
        "finding_category": code(segment.category),
        "finding_sites": _sites(segment.site or segment.type, segment.laterality),
        "algorithm_id": _algorithm(findings, context),
    }
    numbers = _measured(segment.measurements, findings, context)
    if not segmentations:
        group = _planar(box, segment, source, about, numbers)
        _infer_from_region(group)
        return [group]
    return [
        _planar(box, segment, source, about, None),
        _volumetric(segment, segment, source, segmentations, about, numbers),
    ]


def _planar(box: Box, tracked: Finding | Segment, source: Source, about: dict[str, Any], numbers: Any) -> Any:
    """Return the TID 1410 group that draws: a closed polygon of five points around the box on its key frame."""
    frame = source.frames[box.frame]
    dataset = source.datasets[frame.instance]
    corners = [
        (box.left, box.top),
        (box.right, box.top),
        (box.right, box.bottom),
        (box.left, box.bottom),
        (box.left, box.top),
    ]
    region = sr.ImageRegion(
        graphic_type=sr.GraphicTypeValues.POLYLINE,
        graphic_data=np.array(corners, np.float32),
        source_image=sr.SourceImageForRegion(
            referenced_sop_class_uid=dataset.SOPClassUID,
            referenced_sop_instance_uid=dataset.SOPInstanceUID,
            referenced_frame_numbers=[frame.frame_number] if _is_multi_frame(dataset) else None,
        ),
    )
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(tracked),
        referenced_region=region,
        measurements=numbers,
        geometric_purpose=_BOUNDED_BY,
        **about,
    )


def _volumetric(
    segment: Segment,
    tracked: Finding | Segment,
    source: Source,
    segmentations: Sequence[Dataset],
    about: dict[str, Any],
    numbers: Any,
) -> Any:
    """Return the TID 1411 group that measures: the numbers of a segment of the SEG."""
    segmentation, number = _place_of(segment, segmentations)
    reference = sr.ReferencedSegment(
        sop_class_uid=segmentation.SOPClassUID,
        sop_instance_uid=segmentation.SOPInstanceUID,
        segment_number=number,
        source_series=sr.SourceSeriesForSegmentation(source.datasets[0].SeriesInstanceUID),
    )
    return sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=_tracking(tracked), referenced_segment=reference, measurements=numbers, **about
    )


def _place_of(segment: Segment, segmentations: Sequence[Dataset]) -> tuple[Dataset, int]:
    """Return the segmentation object that has a segment, and its Segment Number there."""
    return next(
        (segmentation, int(item.SegmentNumber))
        for segmentation in segmentations
        for item in segmentation.SegmentSequence
        if item.get("TrackingUID") == segment.tracking_uid
    )


def _absent(looked_for: Code, findings: Findings, context: Context) -> Any:
    """Return the TID 1501 group that says: looked for, not found."""
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=context.uid(f"tracking absent {looked_for.value}"), identifier=f"No {looked_for.meaning.lower()}"
        ),
        finding_type=code(looked_for),
        algorithm_id=_algorithm(findings, context),
        qualitative_evaluations=[sr.QualitativeEvaluation(name=_PRESENCE, value=_ABSENT)],
    )


def _answered(answer: Answer, findings: Findings, context: Context) -> Any:
    """Return the TID 1501 group of an answer on the whole series, with its probability."""
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=answer.tracking_uid, identifier=answer.label),
        finding_type=code(answer.question),
        algorithm_id=_algorithm(findings, context),
        measurements=[
            sr.Measurement(
                name=_CERTAINTY,
                value=round(answer.probability * 100, 1),
                unit=_PERCENT,
                algorithm_id=_algorithm(findings, context),
            )
        ],
        qualitative_evaluations=[sr.QualitativeEvaluation(name=code(answer.question), value=code(answer.answer))],
    )


def _infer_from_region(group: Any) -> None:
    """Give every number of a TID 1410 group its own copy of the region it was inferred from.

    Viewers that make a measurement editable look for the coordinates inside the number.
    """
    items = group[0].ContentSequence
    region = next(item for item in items if item.ValueType == "SCOORD")
    for item in items:
        if item.ValueType == "NUM":
            copied = deepcopy(region)
            copied.RelationshipType = "INFERRED FROM"
            item.ContentSequence = [*item.get("ContentSequence", ()), copied]


def _library(key_frames: Sequence[int], source: Source, images: Sequence[Dataset]) -> list[Dataset]:
    """Return the images that the report draws on, one entry each: the whole series would cost 3.5 kB a slice."""
    first_frames = {source.frames[frame].instance: source.frames[frame] for frame in sorted(key_frames, reverse=True)}
    return [flat(images[number], first_frames[number].frame_number) for number in sorted(first_frames)]


# -- parts --------------------------------------------------------------------------------------------------------


def _tracking(tracked: Finding | Segment) -> Any:
    return sr.TrackingIdentifier(uid=tracked.tracking_uid, identifier=tracked.tracking_identifier)


def _sites(site: Code | None, laterality: Code | None) -> list[Any] | None:
    if site is None:
        return None
    return [sr.FindingSite(code(site), laterality=code(laterality) if laterality else None)]


def _algorithm(findings: Findings, context: Context) -> Any:
    parameters = algorithm_parameters(context, findings.parameters)
    return sr.AlgorithmIdentification(
        name=context.model.name,
        version=context.model.version,
        parameters=[f"{name}={value}" for name, value in parameters.items()],
        family=ARTIFICIAL_INTELLIGENCE,
        manufacturer=context.model.manufacturer[:64],
    )


def _certainty(finding: Finding, findings: Findings, context: Context) -> Any:
    return sr.Measurement(
        name=_CERTAINTY,
        value=round(finding.confidence * 100, 1),
        unit=_PERCENT,
        algorithm_id=_algorithm(findings, context),
    )


def _measured(measurements: Sequence[Measurement], findings: Findings, context: Context) -> list[Any]:
    return [
        sr.Measurement(
            name=code(measurement.name),
            value=measurement.value,
            unit=code(measurement.unit),
            derivation=code(measurement.derivation) if measurement.derivation else None,
            algorithm_id=_algorithm(findings, context),
        )
        for measurement in measurements
    ]


def _predecessor(earlier: Predecessor, image: Dataset) -> Dataset:
    """Return what highdicom reads of an earlier version (PS3.3 C.17.2.3)."""
    reference = Dataset()
    reference.update(image)
    for keyword, uid in {
        "SOPClassUID": earlier.sop_class_uid,
        "SOPInstanceUID": earlier.sop_instance_uid,
        "SeriesInstanceUID": earlier.series_instance_uid,
        "StudyInstanceUID": earlier.study_instance_uid,
    }.items():
        put(reference, keyword, uid)
    return reference


def _is_multi_frame(dataset: Dataset) -> bool:
    return int(dataset.get("NumberOfFrames") or 1) > 1
