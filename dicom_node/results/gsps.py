"""Outlines, boxes and labels as softcopy presentation states, grey or colour (PS3.3 A.33.1, A.33.2).

What most PACS show over the images where they show neither SEG nor SR.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import highdicom as hd
import numpy as np
from PIL import ImageCms
from pydicom import Dataset

from dicom_node.findings import Box, Finding, Segment
from dicom_node.labelling import MANUFACTURER_MODEL_NAME
from dicom_node.results import Work
from dicom_node.results.contours import Contour, contours
from dicom_node.results.drawing import FINDING_COLOUR, caption
from dicom_node.results.header import complete, made_by
from dicom_node.results.rendering import aspect, is_colour, window_of

_SERIES_OFFSET = 12
_FINDINGS = "FINDINGS"
_MOST_POINTS = 4000  # of one outline: explicit VR gives a value of FL no more than 64 KiB
_MOST_OUTLINES = 100  # of one segment on one image, the largest: more are noise, and take viewers a minute to draw
_LABEL_ROWS = 0.04  # height of a label, of the image

Transform = tuple[float, float]
"""Rescale slope and intercept."""


def encode(work: Work) -> Sequence[Dataset]:
    """Return a presentation state over the images that have something on them; none where nothing has.

    One object has one modality transformation (C.11.1): images that differ in theirs, as PET slices do, get one
    object for each. Images in colours of a palette have no presentation state of their own.
    """
    frames = sorted(
        {frame for segment in work.findings.segments for frame in _frames(segment, work)} | _key_frames(work)
    )
    if not frames or work.headers.images[0].get("PhotometricInterpretation") == "PALETTE COLOR":
        return []
    groups: dict[Transform, list[int]] = {}
    for frame in frames:
        groups.setdefault(_transform(work.source.header_of(frame)), []).append(frame)
    layers = _layers(work)
    return [
        _state(number, transform, members, layers, work)
        for number, (transform, members) in enumerate(groups.items(), start=1)
    ]


def _state(number: int, transform: Transform, frames: Sequence[int], layers: dict[str, Any], work: Work) -> Dataset:
    headers, context = work.headers, work.context
    instances = sorted({work.source.frames[frame].instance for frame in frames})
    first = work.source.header_of(frames[0])
    annotations = list(_annotations(frames, layers, work))
    used = {annotation.GraphicLayer for annotation in annotations}
    arguments: dict[str, Any] = {
        "referenced_images": [headers.images[instance] for instance in instances],
        "series_instance_uid": context.uid("gsps series"),
        "series_number": context.series_number,
        "sop_instance_uid": context.uid("gsps", number),
        "manufacturer_model_name": MANUFACTURER_MODEL_NAME,
        "software_versions": context.software_versions[0],
        "device_serial_number": context.ae_title,
        "content_label": context.content_label,
        "content_description": context.disclaimer[:64],
        "graphic_annotations": annotations,
        "graphic_layers": [layer for name, layer in layers.items() if name in used],
        "concept_name": None,
        **made_by(context),
        "instance_number": number,
    }
    if is_colour(first):
        # what the images' colours mean where they do not say it themselves (PS3.3 C.11.15)
        profile = first.get("ICCProfile") or _srgb()
        state: Dataset = hd.pr.ColorSoftcopyPresentationState(**arguments, icc_profile=profile)
    else:
        window = window_of(work.source, frames[len(frames) // 2])
        inverse = first.get("PhotometricInterpretation") == "MONOCHROME1"
        state = hd.pr.GrayscaleSoftcopyPresentationState(
            **arguments,
            modality_lut_transformation=_modality_lut(transform, first),
            voi_lut_transformations=[hd.pr.SoftcopyVOILUTTransformation(window.centre, window.width)],
            presentation_lut_transformation=hd.PresentationLUTTransformation(
                presentation_lut_shape="INVERSE" if inverse else "IDENTITY"
            ),
        )
    _mend_displayed_area(state, first)
    return complete(state, headers, context, series_offset=_SERIES_OFFSET)


def _srgb() -> bytes:
    """Return sRGB as the profile of a colour space: a monitor's, which it comes as, is not allowed (C.11.15.1.1)."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:12] + b"spac" + profile[16:]


def _modality_lut(transform: Transform, header: Dataset) -> Any:
    """Return slope and intercept, which must be stated: an absent Modality LUT means none (PS3.3 C.11.6)."""
    kind = str(header.get("RescaleType") or ("HU" if header.get("Modality") == "CT" else "US"))
    return hd.ModalityLUTTransformation(rescale_slope=transform[0], rescale_intercept=transform[1], rescale_type=kind)


def _transform(header: Dataset) -> Transform:
    return float(header.get("RescaleSlope") or 1.0), float(header.get("RescaleIntercept") or 0.0)


def _mend_displayed_area(state: Dataset, header: Dataset) -> None:
    """State the pixels' true proportions, which highdicom takes for square."""
    area = state.DisplayedAreaSelectionSequence[0]
    area.pop("PixelOriginInterpretation", None)
    area.PresentationPixelAspectRatio = [max(round(aspect(header) * 1000), 1), 1000]
    spacing = header.get("PixelSpacing")
    if spacing:
        area.PresentationPixelSpacing = [float(value) for value in spacing]
        del area.PresentationPixelAspectRatio


# -- what is drawn ------------------------------------------------------------------------------------------------


def _layers(work: Work) -> dict[str, Any]:
    """Return a graphic layer for each segment in its colour, and one for the boxes, above them."""
    made = {
        _layer_name(number): hd.pr.GraphicLayer(
            _layer_name(number), number + 1, segment.label[:64], hd.color.CIELabColor.from_rgb(*segment.colour)
        )
        for number, segment in enumerate(work.findings.segments)
    }
    yellow = hd.color.CIELabColor.from_rgb(*FINDING_COLOUR)
    made[_FINDINGS] = hd.pr.GraphicLayer(_FINDINGS, len(made) + 1, "AI findings", yellow)
    return made


def _layer_name(number: int) -> str:
    return f"SEGMENT {number + 1}"


def _annotations(frames: Sequence[int], layers: dict[str, Any], work: Work) -> Iterator[Any]:
    """Yield what is drawn on each frame: outlines of segments, boxes of findings, their names on the key frame."""
    outlined = {finding.segment for finding in work.findings.findings}
    for number, segment in enumerate(work.findings.segments):
        key = None if number in outlined else work.layers.box_of(segment)
        for frame in (frame for frame in _frames(segment, work) if frame in frames):
            mask = work.findings.labels[segment.layer][frame] == segment.value
            largest = sorted(contours(mask), key=len, reverse=True)[:_MOST_OUTLINES]
            lines = [_line(contour, segment) for contour in largest]
            texts = [_label(segment, key, work)] if key and key.frame == frame else []
            yield _annotation(frame, layers[_layer_name(number)], lines, texts, work)
    for finding in work.findings.findings:
        if finding.box.frame in frames:
            lines = [_line(_corners(finding.box), finding)]
            texts = [_label(finding, finding.box, work)]
            yield _annotation(finding.box.frame, layers[_FINDINGS], lines, texts, work)
    for frame in frames:
        yield _annotation(frame, layers[_FINDINGS], [], [_notice(work)], work)


def _annotation(frame: int, layer: Any, lines: Sequence[Any], texts: Sequence[Any], work: Work) -> Any:
    place = work.source.frames[frame]
    image = work.headers.images[place.instance]
    numbers = [place.frame_number] if int(image.get("NumberOfFrames") or 1) > 1 else None
    return hd.pr.GraphicAnnotation(
        [image], layer, referenced_frame_number=numbers, graphic_objects=lines or None, text_objects=texts or None
    )


def _line(contour: Contour, tracked: Finding | Segment) -> Any:
    step = -(-len(contour) // _MOST_POINTS)
    points = contour if step == 1 else np.concatenate([contour[:-1:step], contour[:1]])
    return hd.pr.GraphicObject(
        "POLYLINE",
        points,
        "PIXEL",
        tracking_id=tracked.tracking_identifier[:64],
        tracking_uid=tracked.tracking_uid,
    )


def _corners(box: Box) -> Contour:
    return np.array(
        [
            (box.left, box.top),
            (box.right, box.top),
            (box.right, box.bottom),
            (box.left, box.bottom),
            (box.left, box.top),
        ],
        np.float32,
    )


def _label(tracked: Finding | Segment, box: Box, work: Work) -> Any:
    """Return a name above a box, or below it where there is no room above."""
    image = work.headers.images[work.source.frames[box.frame].instance]
    rows, columns = int(image.Rows), int(image.Columns)
    height = max(rows * _LABEL_ROWS, 1.0)
    top = box.top - height if box.top >= height else min(box.bottom, rows - height)
    left = min(box.left, columns * 0.6)
    return hd.pr.TextObject(
        caption(tracked),
        "PIXEL",
        bounding_box=(left, max(top, 0.0), float(columns), max(top, 0.0) + height),
        text_justification="LEFT",
        tracking_id=tracked.tracking_identifier[:64],
        tracking_uid=tracked.tracking_uid,
    )


def _notice(work: Work) -> Any:
    """Return the line at the bottom of each image that says what it is."""
    text = f"{work.context.series_description()}. {work.context.disclaimer}"
    return hd.pr.TextObject(text, "DISPLAY", bounding_box=(0.02, 0.95, 0.98, 0.99), text_justification="LEFT")


def _frames(segment: Segment, work: Work) -> list[int]:
    present = (work.findings.labels[segment.layer] == segment.value).any(axis=(1, 2))
    return [int(frame) for frame in np.flatnonzero(present)]


def _key_frames(work: Work) -> set[int]:
    return {finding.box.frame for finding in work.findings.findings}
