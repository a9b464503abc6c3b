"""A model's prediction, in voxels, becomes findings, in codes, on the source's own slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dicom_node.errors import ModelRefused
from dicom_node.findings import Box, Code, Finding, Findings, Measurement, Segment
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
        ModelRefused: the prediction has a label or a detection that the manifest does not name, or another shape.
    """
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
    labels = tuple(array for array in (_organ_labels(prediction, volume, organs), outlines) if array is not None)
    return Findings(
        labels=labels,
        segments=tuple(segments),
        findings=tuple(findings),
        looked_for=tuple(output.finding.code() for output in manifest.outputs.detections.values()),
        parameters=dict(prediction.parameters),
    )


# -- organs -------------------------------------------------------------------------------------------------------


def _organs(prediction: Prediction, volume: Volume, manifest: Manifest, context: Context) -> list[Segment]:
    if prediction.labels is None:
        return []
    _require_shape(prediction.labels, volume.grid)
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


# -- detections ---------------------------------------------------------------------------------------------------


def _outlines(
    prediction: Prediction, volume: Volume, ranked: Sequence[Detection]
) -> tuple[npt.NDArray[np.unsignedinteger] | None, dict[int | None, int]]:
    """Return the outlines on the source's grid, numbered from 1 by rank, and old value -> new number."""
    if prediction.instances is None:
        return None, {}
    _require_shape(prediction.instances, volume.grid)
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
        if detection.name not in manifest.outputs.detections:
            raise ModelRefused(f"{manifest.name}: detection {detection.name!r} is not in outputs.detections")
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
    inside = np.zeros(volume.grid.values.shape, np.bool_)
    region = tuple(slice(first, last) for first, last in detection.box)
    if instances is not None and detection.value:
        inside[region] = instances[region] == detection.value
    if not inside.any():
        return _box_without_outline(detection, volume, inside)
    on_source = volume.to_source(inside)
    frame = int(np.argmax(on_source.sum(axis=(1, 2))))
    return _box_around(on_source[frame], frame)


def _box_without_outline(detection: Detection, volume: Volume, empty: npt.NDArray[np.bool_]) -> Box:
    plane = [slice(first, last) for first, last in detection.box]
    stack = volume.grid.stack
    key = min(max(round(detection.centre[stack]), 0), empty.shape[stack] - 1)
    plane[stack] = slice(key, key + 1)
    empty[tuple(plane)] = True
    on_source = volume.to_source(empty)
    frame = int(np.argmax(on_source.any(axis=(1, 2))))
    return _box_around(on_source[frame], frame)


def _box_around(mask: npt.NDArray[np.bool_], frame: int) -> Box:
    """Return the half-open box around a 2D mask `(rows, columns)` as DICOM image coordinates."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(frame, float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


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


def _require_shape(array: npt.NDArray[np.unsignedinteger], grid: Grid) -> None:
    if array.shape != grid.values.shape:
        raise ModelRefused(f"the model answers with shape {array.shape} to a grid of {grid.values.shape}")
