"""A model's prediction, in voxels, becomes findings, in codes, on the source's own slices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dicom_node.errors import ModelRefused, NotApplicable
from dicom_node.findings import Answer, Box, Finding, Findings, Map, Reason, Segment
from dicom_node.labelling import Context
from dicom_node.manifest import DetectionOutput, Manifest
from workers.prediction import Detection, Prediction
from workers.quantities import as_detected
from workers.structures import LATERALITY, structures
from workers.volume import Volume


def findings_of(prediction: Prediction, volume: Volume, manifest: Manifest, context: Context) -> Findings:
    """Return what the model says, by the manifest's codes; segments without a voxel are left out.

    Raises:
        NotApplicable: the model looks for structures only, and none is there.
        ModelRefused: the prediction has a label or a detection that the manifest does not name, or another shape.
    """
    _require_sense(prediction, volume, manifest)
    found = structures(prediction, volume.grid, manifest, context)
    ranked = sorted(prediction.detections, key=lambda detection: -detection.confidence)
    outlines, outlined = _outlines(prediction, volume, ranked)
    names = _names(ranked, manifest)
    layer = len(found.labels)
    segments = list(found.segments)
    findings = []
    for detection, name in zip(ranked, names, strict=True):
        output = manifest.outputs.detections[detection.name]
        finding = _finding(detection, name, output, volume, prediction, context)
        if detection.value in outlined:
            segment = len(segments)
            segments.append(_outline_segment(finding, output, layer, outlined[detection.value]))
            findings.append(replace(finding, segment=segment))
        else:
            findings.append(finding)
    if not segments and manifest.outputs.segments and not (manifest.outputs.detections or prediction.classes):
        raise NotApplicable(Reason.ORGAN_NOT_FOUND, "no structure of the model is in the images")
    labels: list[npt.NDArray[np.unsignedinteger]] = [volume.to_source(array) for array in found.labels]
    if outlines is not None:
        labels.append(outlines)
    return Findings(
        labels=tuple(labels),
        segments=tuple(segments),
        findings=tuple(findings),
        looked_for=tuple(output.finding.code() for output in manifest.outputs.detections.values()),
        parameters=dict(prediction.parameters),
        incomplete=prediction.incomplete,
        maps=_maps(prediction, volume, manifest),
        answers=_answers(prediction, manifest, context),
        window=manifest.outputs.window,
    )


def _answers(prediction: Prediction, manifest: Manifest, context: Context) -> tuple[Answer, ...]:
    made = []
    for name, (index, probability) in prediction.classes.items():
        output = manifest.outputs.classifications[name]
        answer = output.classes[index].code()
        uid = context.uid(f"tracking answer {name}")
        made.append(Answer(output.label, output.concept.code(), answer, float(np.clip(probability, 0, 1)), uid))
    return tuple(made)


def _maps(prediction: Prediction, volume: Volume, manifest: Manifest) -> tuple[Map, ...]:
    return tuple(
        Map(output.label, output.quantity.code(), volume.to_source(prediction.maps[name]))
        for name, output in manifest.outputs.maps.items()
        if name in prediction.maps
    )


# -- detections ---------------------------------------------------------------------------------------------------


def _outlines(
    prediction: Prediction, volume: Volume, ranked: Sequence[Detection]
) -> tuple[npt.NDArray[np.unsignedinteger] | None, dict[int | None, int]]:
    """Return the outlines on the source's grid, numbered from 1 by rank, and old value -> new number."""
    if prediction.instances is None:
        return None, {}
    present = set(np.unique(prediction.instances).tolist())
    values = [detection.value for detection in ranked if detection.value in present and detection.value]
    if not values:
        return None, {}
    numbers: dict[int | None, int] = {value: number for number, value in enumerate(dict.fromkeys(values), start=1)}
    table: npt.NDArray[np.unsignedinteger] = np.zeros(
        int(prediction.instances.max()) + 1, np.uint8 if len(numbers) <= 255 else np.uint16
    )
    for value, number in numbers.items():
        table[value] = number
    return volume.to_source(table[prediction.instances]), numbers


def _names(ranked: Sequence[Detection], manifest: Manifest) -> list[str]:
    """Return `Nodule 1`, `Nodule 2`, ... for each kind of detection in the order of rank."""
    counts: dict[str, int] = {}
    names = []
    for detection in ranked:
        counts[detection.name] = counts.get(detection.name, 0) + 1
        names.append(f"{manifest.outputs.detections[detection.name].label} {counts[detection.name]}")
    return names


def _finding(
    detection: Detection,
    name: str,
    output: DetectionOutput,
    volume: Volume,
    prediction: Prediction,
    context: Context,
) -> Finding:
    return Finding(
        label=name,
        finding=output.finding.code(),
        category=output.category.code(),
        box=box_on_source(detection, volume, prediction.instances),
        confidence=float(np.clip(detection.confidence, 0.0, 1.0)),
        tracking_identifier=name,
        tracking_uid=context.uid(f"tracking {name}"),
        site=output.site.code() if output.site else None,
        laterality=LATERALITY[detection.laterality],
        measurements=as_detected(detection.measurements),
    )


def _outline_segment(finding: Finding, output: DetectionOutput, layer: int, value: int) -> Segment:
    return Segment(
        layer=layer,
        value=value,
        label=finding.label,
        category=finding.category,
        type=finding.finding,
        colour=output.colour,
        tracking_identifier=finding.tracking_identifier,
        tracking_uid=finding.tracking_uid,
        site=finding.site,
        laterality=finding.laterality,
        measurements=finding.measurements,
    )


def box_on_source(detection: Detection, volume: Volume, instances: npt.NDArray[np.uint16] | None) -> Box:
    """Return the detection's box on its key frame: where its outline is largest, else where its centre lies."""
    stack = volume.grid.stack
    box = list(detection.box)
    box[stack] = (plane := min(max(round(detection.centre[stack]), 0), len(volume.grid.positions) - 1), plane + 1)
    if instances is not None and detection.value:
        region = instances[tuple(slice(first, last) for first, last in detection.box)] == detection.value
        if region.any():
            box = _key_section(region, detection, stack)
    (frame, _), (top, bottom), (left, right) = volume.box_to_source(box)
    return Box(frame, float(left), float(top), float(right), float(bottom))


def _key_section(region: npt.NDArray[np.bool_], detection: Detection, stack: int) -> list[tuple[int, int]]:
    """Return the voxel box of an outline on the plane that cuts most of it; `region` is the detection's own box."""
    in_plane = tuple(axis for axis in range(3) if axis != stack)
    plane = int(np.argmax(region.sum(axis=in_plane)))
    section = np.take(region, [plane], axis=stack)
    box = []
    for axis, (start, _) in enumerate(detection.box):
        inside = np.flatnonzero(section.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append((start + int(inside[0]), start + int(inside[-1]) + 1))
    box[stack] = (detection.box[stack][0] + plane, detection.box[stack][0] + plane + 1)
    return box


# -- a model may be wrong -----------------------------------------------------------------------------------------


def _require_sense(prediction: Prediction, volume: Volume, manifest: Manifest) -> None:
    """Raise ModelRefused for what would be a wrong result, or none, if it were written."""
    shape = volume.grid.shape
    if unknown := prediction.maps.keys() - manifest.outputs.maps.keys():
        raise ModelRefused(f"{manifest.name}: maps {sorted(unknown)} are not in outputs.maps")
    for name, (index, _) in prediction.classes.items():
        if name not in manifest.outputs.classifications or index not in manifest.outputs.classifications[name].classes:
            raise ModelRefused(f"{manifest.name}: class {index} of {name!r} is not in outputs.classifications")
    for array in (prediction.labels, prediction.instances, *prediction.overlapping, *prediction.maps.values()):
        if array is not None and array.shape != shape:
            raise ModelRefused(f"{manifest.name} answers with shape {array.shape} to a grid of {shape}")
    values = [detection.value for detection in prediction.detections if detection.value]
    if len(set(values)) < len(values):
        raise ModelRefused(f"{manifest.name}: two detections have one outline")
    for detection in prediction.detections:
        if fault := _fault(detection, shape, manifest):
            raise ModelRefused(f"{manifest.name}: detection {detection.name!r} {fault}")


def _fault(detection: Detection, shape: Sequence[int], manifest: Manifest) -> str:
    """Return what is wrong with a detection, "" where nothing is."""
    numbers = (*detection.centre, detection.confidence, *detection.measurements.values())
    if detection.name not in manifest.outputs.detections:
        return "is not in outputs.detections"
    if detection.laterality not in LATERALITY:
        return f"has laterality {detection.laterality!r}"
    if not all(map(math.isfinite, numbers)):
        return "has a number that is none"
    if any(not 0 <= first < last <= size for (first, last), size in zip(detection.box, shape, strict=True)):
        return f"has box {detection.box} in a grid of {tuple(shape)}"
    return ""
