"""What a network's numbers say: channels become label values, boxes become detections, scores become classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Boxes, Outputs
from workers.prediction import Detection, Grid
from workers.preparing import Prepared
from workers.windows import chosen

Labels = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]
_MOST_BOXES = 500  # before overlapping ones are dropped; a network that finds more finds nothing


@dataclass(frozen=True, slots=True)
class Answer:
    """Label values over the network's array, one layer for each set that does not overlap; and how sure."""

    layers: tuple[Labels, ...]
    certainty: dict[int, float]


def labelled(scores: Array, outputs: Outputs) -> Answer:
    """Return label values of scores `(channels, *axes)`: logits, or label values where the manifest says so.

    Raises:
        ModelRefused: the answer has another number of channels than the manifest has values.
    """
    if outputs.activation == "labels":
        return Answer((scores[0].round().astype(np.uint8),), {})
    if outputs.activation == "sigmoid":
        return _independent(scores, outputs)
    highest = max(outputs.segments)
    if len(scores) <= highest:
        raise ModelRefused(f"outputs.segments.{highest}: the network has only {len(scores)} channels, counted from 0")
    labels = scores.argmax(axis=0).astype(np.uint8)
    probabilities = _softmax_of_largest(scores)
    unwanted = [value for value in range(1, len(scores)) if value not in outputs.segments]
    labels[np.isin(labels, unwanted)] = 0
    return Answer((labels,), {value: _mean(probabilities, labels == value) for value in outputs.segments})


def _independent(scores: Array, outputs: Outputs) -> Answer:
    """Return a layer for each channel that may overlap others: channel c is value c + 1, its own probability."""
    highest = max(outputs.segments)
    if len(scores) < highest:
        raise ModelRefused(f"outputs.segments.{highest}: the network has only {len(scores)} channels")
    layers: list[Labels] = []
    certainty = {}
    for value in sorted(outputs.segments):
        probability = _sigmoid(scores[value - 1])
        mask = probability > outputs.threshold
        certainty[value] = _mean(probability, mask)
        free = next((layer for layer in layers if not (layer[mask] > 0).any()), None)
        if free is None:
            free = np.zeros(mask.shape, np.uint8)
            layers.append(free)
        free[mask] = value
    return Answer(tuple(layers), certainty)


def largest_only(labels: Labels, outputs: Outputs) -> Labels:
    """Drop all but the largest piece of each value whose output says so, in place; return the labels."""
    for value, output in outputs.segments.items():
        if output.keep == "largest":
            numbered, count = ndimage.label(labels == value)
            if count > 1:
                sizes = np.bincount(numbered.ravel())
                sizes[0] = 0
                labels[(numbered > 0) & (numbered != sizes.argmax())] = 0
    return labels


def probabilities_of(scores: Array, channel: int, outputs: Outputs) -> Array:
    """Return the probability of one channel, 0..1, over the network's array."""
    if outputs.activation == "sigmoid" or len(scores) == 1:
        return _sigmoid(scores[channel])
    shifted = np.exp(scores - scores.max(axis=0))
    return np.asarray(shifted[channel] / shifted.sum(axis=0), np.float32)


def _softmax_of_largest(scores: Array) -> Array:
    return np.asarray(1 / np.exp(scores - scores.max(axis=0)).sum(axis=0), np.float32)


def _sigmoid(scores: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(scores, -60, 60))), np.float32)


def _mean(probabilities: Array, mask: npt.NDArray[np.bool_]) -> float:
    return float(probabilities[mask].mean()) if mask.any() else 0.0


# -- boxes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """Boxes over the network's array: corners `(n, 2, axes)` in voxel edges, scores and classes `(n,)`."""

    corners: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]


def boxes_of(windows: Sequence[tuple[tuple[int, ...], Any]], layout: Boxes, *, flat: bool = False) -> Found:
    """Return all boxes of all windows, each at its place in the array.

    Where the network is `flat`, a place begins with the number of the plane, and a box lies on that plane alone.
    """
    found = [
        _on_plane(_boxes(answer, layout, place[1:]), place[0]) if flat else _boxes(answer, layout, place)
        for place, answer in windows
    ]
    return Found(
        np.concatenate([one.corners for one in found]),
        np.concatenate([one.scores for one in found]),
        np.concatenate([one.classes for one in found]),
    )


def _boxes(answer: Any, layout: Boxes, place: Sequence[int]) -> Found:
    while isinstance(answer, (list, tuple)) and len(answer) == 1 and not isinstance(answer[0], torch.Tensor):
        answer = answer[0]  # one answer for each image of a batch of one
    values = [_column(answer, name, "outputs.boxes") for name in (layout.boxes, layout.scores, layout.labels)]
    axes = len(place)
    boxes = values[0].reshape(-1, 2 * axes)
    scores, classes = values[1].reshape(-1), values[2].reshape(-1)
    if not len(boxes) == len(scores) == len(classes):
        raise ModelRefused(f"outputs.boxes: {len(boxes)} boxes, {len(scores)} scores and {len(classes)} labels")
    corners = _LAYOUTS[layout.format](boxes, axes) + np.asarray(place, float)
    return Found(corners, scores, classes.astype(np.int64))


def _on_plane(found: Found, plane: int) -> Found:
    depth = np.broadcast_to(np.array([plane, plane + 1.0]).reshape(1, 2, 1), (len(found.scores), 2, 1))
    return Found(np.concatenate([depth, found.corners], axis=2), found.scores, found.classes)


def _column(answer: Any, name: int | str, key: str) -> npt.NDArray[np.float64]:
    try:
        return chosen(answer, name).detach().cpu().double().numpy()
    except ModelRefused as error:
        raise ModelRefused(f"{key}: the network has no output {name!r}") from error


def _corners(boxes: npt.NDArray[np.float64], axes: int) -> npt.NDArray[np.float64]:
    return boxes.reshape(-1, 2, axes)


def _pairs(boxes: npt.NDArray[np.float64], axes: int) -> npt.NDArray[np.float64]:
    return boxes.reshape(-1, axes, 2).transpose(0, 2, 1)


def _centres(boxes: npt.NDArray[np.float64], axes: int) -> npt.NDArray[np.float64]:
    half = boxes[:, axes:] / 2
    return np.stack([boxes[:, :axes] - half, boxes[:, :axes] + half], axis=1)


_LAYOUTS = {"corners": _corners, "pairs": _pairs, "centre_size": _centres}


def surest(found: Found, outputs: Outputs) -> Found:
    """Return the boxes above their threshold, of those of one class that overlap only the surest."""
    thresholds = {output.value: output.threshold for output in outputs.detections.values()}
    enough = np.array(
        [score >= thresholds.get(int(one), np.inf) for score, one in zip(found.scores, found.classes, strict=True)],
        bool,
    )
    usable = enough & (found.corners[:, 1] > found.corners[:, 0]).all(axis=1) & np.isfinite(found.scores)
    order = [int(n) for n in np.argsort(-found.scores, kind="stable") if usable[n]][:_MOST_BOXES]
    overlap = outputs.boxes.overlap if outputs.boxes else 0.5
    kept: list[int] = []
    for n in order:
        same = [other for other in kept if found.classes[other] == found.classes[n]]
        if all(shared(found.corners[n], found.corners[other]) <= overlap for other in same):
            kept.append(n)
    return Found(found.corners[kept], found.scores[kept], found.classes[kept])


def shared(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Return the intersection of two boxes over their union."""
    inside = np.clip(np.minimum(one[1], other[1]) - np.maximum(one[0], other[0]), 0, None).prod()
    union = (one[1] - one[0]).prod() + (other[1] - other[0]).prod() - inside
    return float(inside / union) if union > 0 else 0.0


def detections(found: Found, prepared: Prepared, outputs: Outputs) -> tuple[Detection, ...]:
    """Return boxes over the network's array as detections on the grid, the surest first."""
    names: Mapping[int, str] = {output.value: name for name, output in outputs.detections.items()}
    made = []
    for corners, score, value in zip(found.corners, found.scores, found.classes, strict=True):
        edges = prepared.edges_back([(float(low), float(high)) for low, high in zip(*corners, strict=True)])
        made.append(_detection(names[int(value)], edges, float(score), prepared.grid))
    return tuple(made)


def _detection(name: str, edges: Sequence[tuple[float, float]], score: float, grid: Grid) -> Detection:
    box = []
    for (low, high), size in zip(edges, grid.shape, strict=True):
        first = min(max(round(low), 0), size - 1)
        box.append((first, min(max(round(high), first + 1), size)))
    centre = tuple((low + high) / 2 - 0.5 for low, high in edges)
    return Detection(name, (box[0], box[1], box[2]), (centre[0], centre[1], centre[2]), score)


# -- classes ------------------------------------------------------------------------------------------------------


def classified(answer: Any, outputs: Outputs) -> dict[str, tuple[int, float]]:
    """Return for each classification the likeliest class and its probability.

    A network with one classification answers `(1, classes)`; with several, one output for each, by its name.
    """
    made = {}
    for name in outputs.classifications:
        scores = chosen(answer, name if isinstance(answer, Mapping) else outputs.output).detach().cpu().double()
        scores = scores.reshape(-1)
        if len(scores) == 1:  # one number: the probability of class 1
            probability = float(torch.sigmoid(scores)[0])
            made[name] = (1, probability) if probability >= outputs.threshold else (0, 1 - probability)
        else:
            likely = torch.softmax(scores, dim=0)
            made[name] = (int(likely.argmax()), float(likely.max()))
    return made
