"""Masks as a Segmentation object: BINARY, native, on the source's own slices (PS3.3 A.51)."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from dicom_node.findings import Findings, Segment
from dicom_node.labelling import MANUFACTURER_MODEL_NAME, Context
from dicom_node.results.header import (
    ARTIFICIAL_INTELLIGENCE,
    Headers,
    algorithm_parameters,
    code,
    complete,
    made_by,
    prepared,
)
from dicom_node.source import Source

_SERIES_OFFSET = 0
_LAYERS = 10  # series numbers that the layers of one model may use


def encode(findings: Findings, source: Source, context: Context, made: object) -> Sequence[Dataset]:
    """Return one SEG for each layer of labels that has a segment; segments in one SEG never overlap."""
    if not findings.layers:
        return []
    headers = prepared(source)
    return [_encode_layer(layer, findings, source, headers, context) for layer in findings.layers]


def _encode_layer(layer: int, findings: Findings, source: Source, headers: Headers, context: Context) -> Dataset:
    segments = findings.segments_of(layer)
    encoded = hd.seg.Segmentation(
        source_images=headers.images,
        pixel_array=_on_frames(_numbered(findings.labels[layer], segments), source),
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[
            _description(number, segment, findings, context) for number, segment in enumerate(segments, start=1)
        ],
        series_instance_uid=context.uid("seg series", layer),
        series_number=context.series_number,
        sop_instance_uid=context.uid("seg", layer),
        manufacturer_model_name=MANUFACTURER_MODEL_NAME,
        software_versions=context.software_versions[0],
        device_serial_number=context.ae_title,
        content_label=context.model.name.upper()[:16],
        content_description=context.disclaimer[:64],
        omit_empty_frames=True,
        **made_by(context),
    )
    _fill_projection(encoded, headers.images[0])
    encoded.ContentCreatorName = None  # type 2: no person made it
    return complete(encoded, headers, context, series_offset=_SERIES_OFFSET + min(layer, _LAYERS - 1))


def _numbered(labels: npt.NDArray[np.unsignedinteger], segments: Sequence[Segment]) -> npt.NDArray[np.uint8]:
    """Return the labels with each segment's value replaced by its Segment Number, everything else 0."""
    table = np.zeros(int(labels.max(initial=0)) + 1, np.uint8 if len(segments) <= 255 else np.uint16)
    for number, segment in enumerate(segments, start=1):
        table[segment.value] = number
    return np.asarray(table[labels])


def _on_frames(labels: npt.NDArray[np.uint8], source: Source) -> npt.NDArray[np.uint8]:
    """Return the labels as highdicom wants them: one plane per dataset, or per frame of the one dataset."""
    single = len(source.datasets) == 1
    frames = int(source.datasets[0].get("NumberOfFrames") or 1) if single else len(source.datasets)
    full = np.zeros((frames, *labels.shape[1:]), labels.dtype)
    for plane, frame in zip(labels, source.frames, strict=True):
        full[frame.frame_number - 1 if single else frame.instance] = plane
    return full


def _description(number: int, segment: Segment, findings: Findings, context: Context) -> hd.seg.SegmentDescription:
    described = hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.label[:64],
        segmented_property_category=code(segment.category),
        segmented_property_type=code(segment.type),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=context.model.name,
            family=ARTIFICIAL_INTELLIGENCE,
            version=context.model.version,
            source=context.model.manufacturer[:64],
            parameters=algorithm_parameters(context, findings.parameters),
        ),
        tracking_uid=segment.tracking_uid,
        tracking_id=segment.tracking_identifier[:64],
        anatomic_regions=[code(segment.site)] if segment.site else None,
        display_color=hd.color.CIELabColor.from_rgb(*segment.colour),
    )
    _set_laterality(described, segment)
    return described


def _set_laterality(described: Dataset, segment: Segment) -> None:
    """Say which side: as a modifier of the region where there is one, else of the property type (PS3.3 C.8.20.2)."""
    if segment.laterality is None:
        return
    modifier = hd.sr.CodedConcept(segment.laterality.value, segment.laterality.scheme, segment.laterality.meaning)
    if "AnatomicRegionSequence" in described:
        described.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [modifier]
    else:
        described.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]


def _fill_projection(encoded: Dataset, reference: Dataset) -> None:
    """A SEG of a projection has no plane in the patient; which way is right must be said (PS3.3 C.7.6.1.1.1)."""
    if "FrameOfReferenceUID" not in reference and reference.get("PatientOrientation"):
        encoded.PatientOrientation = reference.PatientOrientation
