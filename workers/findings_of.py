"""A model's prediction, in voxels, becomes findings, in codes, on the source's own slices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dicom_node.errors import ModelRefused, NotApplicable
from dicom_node.findings import Box, Code, Finding, Findings, Map, Measurement, Reason, Segment
from dicom_node.labelling import Context
from dicom_node.manifest import DetectionOutput, Manifest, SegmentOutput
from workers.prediction import Detection, Grid, Prediction
from workers.volume import Volume

VOLUME = Code("118565006", "SCT", "Volume")
DIAMETER = Code("81827009", "SCT", "Diameter")
CUBIC_CENTIMETRE = Code("cm3", "UCUM", "cubic centimeter")
MILLIMETRE = Code("mm", "UCUM", "mm")
_LATERALITY: Mapping[str | None, Code | None] = {
    "right": Code("24028007", "SCT", "Right"),
    "left": Code("7771000", "SCT", "Left"),
    None: None,
}
_MEASURED = {"volume": (VOLUME, CUBIC_CENTIMETRE, 1e-3), "diameter": (DIAMETER, MILLIMETRE, 1.0)}  # from mm3, mm


def findings_of(prediction: Prediction, volume: Volume, manifest: Manifest, context: Context) -> Findings:
    """Return what the model says, by the manifest's codes; segments without a voxel are left out.

    Raises:
        NotApplicable: the model looks for structures only, and none is there.
        ModelRefused: the prediction has a label or a detection that the manifest does not name, or another shape.
    """
    _require_sense(prediction, volume, manifest)
    organs = _organs(prediction, volume, manifest, context)
    ranked = sorted(prediction.detections, key=lambda detection: -detection.confidence)
    outlines, outlined = _outlines(prediction, volume, ranked)
    names = _names(ranked, manifest)
    layer = 1 if organs else 0
    segments = list(organs)
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
    if not segments and not manifest.outputs.detections:
        raise NotApplicable(Reason.ORGAN_NOT_FOUND, "no structure of the model is in the images")
    labels = tuple(array for array in (_organ_labels(prediction, volume, organs), outlines) if array is not None)
    return Findings(
        labels=labels,
        segments=tuple(segments),
        findings=tuple(findings),
        looked_for=tuple(output.finding.code() for output in manifest.outputs.detections.values()),
        parameters=dict(prediction.parameters),
        incomplete=prediction.incomplete,
        maps=_maps(prediction, volume, manifest),
        window=manifest.outputs.window,
    )


# -- organs -------------------------------------------------------------------------------------------------------


def _organs(prediction: Prediction, volume: Volume, manifest: Manifest, context: Context) -> list[Segment]:
    if prediction.labels is None:
        return []
    sizes = volumes_by_value(prediction.labels, volume.grid)
    if unknown := sizes.keys() - manifest.outputs.segments.keys():
        raise ModelRefused(f"{manifest.name}: label values {sorted(unknown)} are not in outputs.segments")
    return [
        _organ(value, manifest.outputs.segments[value], sizes[value], context)
        for value in sorted(manifest.outputs.segments)
        if sizes.get(value)
    ]


def _organ(value: int, output: SegmentOutput, size: float, context: Context) -> Segment:
    return Segment(
        layer=0,
        value=value,
        label=output.label,
        category=output.category.code(),
        type=output.type.code(),
        colour=output.colour,
        tracking_identifier=output.label,
        tracking_uid=context.uid("tracking segment", value),
        site=output.site.code() if output.site else None,
        laterality=_LATERALITY[output.laterality],
        measurements=(_measurement("volume", size),) if "volume" in output.measurements else (),
    )


def _organ_labels(prediction: Prediction, volume: Volume, organs: Sequence[Segment]) -> npt.NDArray[np.uint8] | None:
    return volume.to_source(prediction.labels) if organs and prediction.labels is not None else None


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
        laterality=_LATERALITY[detection.laterality],
        measurements=tuple(
            _measurement(kind, detection.measurements[kind]) for kind in _MEASURED if kind in detection.measurements
        ),
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


# -- numbers ------------------------------------------------------------------------------------------------------


def volumes_by_value(labels: npt.NDArray[np.unsignedinteger], grid: Grid) -> dict[int, float]:
    """Return the volume (mm3) of each value but 0, each plane counted with the thickness that it stands for."""
    in_plane = float(np.prod([value for axis, value in enumerate(grid.spacing) if axis != grid.stack]))
    planes = np.moveaxis(labels, grid.stack, 0)
    highest = int(labels.max(initial=0))
    sizes = np.zeros(highest + 1)
    for plane, thickness in zip(planes, grid.thickness, strict=True):
        sizes += np.bincount(plane.ravel(), minlength=highest + 1) * thickness * in_plane
    return {value: float(size) for value, size in enumerate(sizes) if value and size}


def _measurement(kind: str, value: float) -> Measurement:
    name, unit, factor = _MEASURED[kind]
    return Measurement(name, float(f"{value * factor:.4g}"), unit)


# -- a model may be wrong -----------------------------------------------------------------------------------------


def _require_sense(prediction: Prediction, volume: Volume, manifest: Manifest) -> None:
    """Raise ModelRefused for what would be a wrong result, or none, if it were written."""
    shape = volume.grid.values.shape
    if unknown := prediction.maps.keys() - manifest.outputs.maps.keys():
        raise ModelRefused(f"{manifest.name}: maps {sorted(unknown)} are not in outputs.maps")
    for array in (prediction.labels, prediction.instances, *prediction.maps.values()):
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
    if detection.laterality not in _LATERALITY:
        return f"has laterality {detection.laterality!r}"
    if not all(map(math.isfinite, numbers)):
        return "has a number that is none"
    if any(not 0 <= first < last <= size for (first, last), size in zip(detection.box, shape, strict=True)):
        return f"has box {detection.box} in a grid of {tuple(shape)}"
    return ""
