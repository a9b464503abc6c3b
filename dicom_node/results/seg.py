"""Masks as Segmentation objects on the source's own slices: bits, native (PS3.3 A.51), or a label map, RLE (A.90)."""

from __future__ import annotations

from collections.abc import Sequence

import highdicom as hd
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from dicom_node.errors import ResultRefused
from dicom_node.findings import Findings, Segment
from dicom_node.labelling import MANUFACTURER_MODEL_NAME, Context
from dicom_node.results import Work
from dicom_node.results.header import (
    ARTIFICIAL_INTELLIGENCE,
    algorithm_parameters,
    code,
    complete,
    made_by,
    on_frames,
)
from dicom_node.results.layers import Labels, Planes
from dicom_node.results.packing import size_of_bits
from dicom_node.results.planes import compress, is_series_of_planes, of_planes
from dicom_node.results.template import leave_encoded

_SERIES_OFFSET = 0
_SPLIT_SERIES_OFFSET = 100
_LONGEST = 0xFFFFFFFE  # bytes of native pixel data
_LAYERS = 10  # series numbers that the layers of one model may use


def encode(work: Work) -> Sequence[Dataset]:
    """Return one SEG for each layer of labels that has a segment; segments in one SEG never overlap.

    A layer of more frames than the form allows, or of more bits than native pixel data can have, becomes one SEG for
    each structure. There is none for frames without a place in the patient, a cine's: such a SEG cannot say which
    frame it lies on.

    Raises:
        ResultRefused: one structure alone has more bits than native pixel data can have.
    """
    if work.form.segmentation_type is None or _is_cine(work.headers.images[0]):
        return []
    parts = [part for layer in work.findings.layers for part in _parts(layer, work)]
    return [_encode_part(number, segments, planes, work) for number, (segments, planes) in enumerate(parts)]


def _is_cine(image: Dataset) -> bool:
    return int(image.get("NumberOfFrames") or 1) > 1 and "FrameOfReferenceUID" not in image


def _parts(layer: int, work: Work) -> list[tuple[tuple[Segment, ...], Planes]]:
    """Return the segments of a layer, together or, where that makes too many frames, each by itself."""
    segments = work.findings.segments_of(layer)
    labels = work.findings.labels[layer]
    ordered = on_frames(labels, work.source)
    planes = work.layers[layer] if ordered is labels else Planes.of(ordered)
    frames = sum(planes.count(segment.value) for segment in segments)
    limit = work.form.split_above
    if not (limit and frames > limit) and not _is_too_long(frames, planes, work):
        return [(segments, planes)]
    if any(_is_too_long(planes.count(segment.value), planes, work) for segment in segments):
        raise ResultRefused("a structure has 4 GB of bits: only as LABELMAP can it be a segmentation")
    return [((segment,), planes) for segment in segments]


def _is_too_long(frames: int, planes: Planes, work: Work) -> bool:
    """Return whether so many frames are more than a length of 32 bits can say (PS3.5 7.1.1); it must be even."""
    _, rows, columns = planes.labels.shape
    return work.form.segmentation_type == "BINARY" and size_of_bits(frames, (rows, columns)) > _LONGEST


def _encode_part(number: int, segments: Sequence[Segment], planes: Planes, work: Work) -> Dataset:
    findings, headers, context = work.findings, work.headers, work.context
    layer = segments[0].layer
    is_whole_layer = len(segments) == len(findings.segments_of(layer))

    def made(images: Sequence[Dataset], labels: Labels) -> Dataset:
        return _made(number, labels, images, segments, work)

    if is_series_of_planes(headers):
        encoded = of_planes(planes, segments, headers, made)
    else:
        encoded = made(headers.images, planes.numbered(segments))
    if encoded.SegmentationType == "LABELMAP":
        compress(encoded)
    _fill_projection(encoded, headers.images[0])
    _put_background_last(encoded)
    encoded.ContentCreatorName = None  # type 2: no person made it
    offset = _SERIES_OFFSET + min(layer, _LAYERS - 1) if is_whole_layer else _SPLIT_SERIES_OFFSET + number
    complete(encoded, headers, context, series_offset=offset)
    if not isinstance(encoded, hd.seg.Segmentation):
        leave_encoded(encoded)
    return encoded


def _made(number: int, labels: Labels, images: Sequence[Dataset], segments: Sequence[Segment], work: Work) -> Dataset:
    """Return what highdicom makes of Segment Numbers, one plane for each image or each frame of the one image."""
    context = work.context
    made: Dataset = hd.seg.Segmentation(
        source_images=images,
        pixel_array=labels,
        segmentation_type=work.form.segmentation_type or "BINARY",
        segment_descriptions=[
            _description(number, segment, work.findings, context) for number, segment in enumerate(segments, start=1)
        ],
        series_instance_uid=context.uid("seg series", number),
        series_number=context.series_number,
        sop_instance_uid=context.uid("seg", number),
        manufacturer_model_name=MANUFACTURER_MODEL_NAME,
        software_versions=context.software_versions[0],
        device_serial_number=context.ae_title,
        content_label=context.content_label,
        content_description=context.disclaimer[:64],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        omit_empty_frames=True,
        **made_by(context),
    )
    return made


def _put_background_last(encoded: Dataset) -> None:
    """Describe a label map's background (number 0) after its segments.

    A widespread viewer takes colours by the order of the items: the background first would shift them all by one.
    """
    encoded.SegmentSequence = sorted(encoded.SegmentSequence, key=lambda item: int(item.SegmentNumber) or 1 << 16)


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
