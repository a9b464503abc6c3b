"""Grids and predictions between two processes: a message of JSON, and beside it arrays as files.

What comes back from a contained model is held against what it was asked: nothing in it is believed.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.prediction import Detection, Grid, Prediction

Message = dict[str, Any]
Array = npt.NDArray[Any]

_ARRAYS = ("values", "positions", "thickness", "directions", "origins")
_MOST_DETECTIONS = 10_000
_MOST_WORDS = 64
_LONGEST_WORDS = 200  # characters
_MOST_LAYERS = 64


# -- there --------------------------------------------------------------------------------------------------------


def write_grid(grid: Grid, folder: Path) -> Message:
    """Write a grid's arrays into `folder`, which is made; return the message that goes with them."""
    folder.mkdir(exist_ok=True)
    arrays = {name: getattr(grid, name) for name in _ARRAYS}
    arrays |= {f"other-{name}": values for name, values in grid.others.items()}
    for name, values in arrays.items():
        path = folder / f"{name}.npy"
        path.unlink(missing_ok=True)  # a model may have kept what it was given before: that file stays as it was
        np.save(path, values, allow_pickle=False)
    return {
        "spacing": list(grid.spacing),
        "stack": grid.stack,
        "placed": grid.placed,
        "modality": grid.modality,
        "others": list(grid.others),
    }


def read_grid(message: Message, folder: Path) -> Grid:
    """Return the grid whose arrays are in `folder`; they are mapped, and a change of them stays in memory."""
    arrays = {name: _mapped(folder / f"{name}.npy") for name in _ARRAYS}
    return Grid(
        **arrays,
        spacing=(message["spacing"][0], message["spacing"][1], message["spacing"][2]),
        stack=message["stack"],
        placed=message["placed"],
        modality=message["modality"],
        others={name: _mapped(folder / f"other-{name}.npy") for name in message["others"]},
    )


def _mapped(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode="c", allow_pickle=False)
    return array.view(np.ndarray)


# -- and back -----------------------------------------------------------------------------------------------------


def write_prediction(prediction: Prediction, folder: Path) -> Message:
    """Write a prediction's arrays into `folder`, which is made; return the message that goes with them."""
    folder.mkdir(exist_ok=True)
    arrays: dict[str, Array] = {f"map-{name}": values for name, values in prediction.maps.items()}
    arrays |= {f"layer-{number}": layer for number, layer in enumerate(prediction.overlapping)}
    if prediction.labels is not None:
        arrays["labels"] = prediction.labels
    if prediction.instances is not None:
        arrays["instances"] = prediction.instances
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
    return {
        "labels": prediction.labels is not None,
        "instances": prediction.instances is not None,
        "layers": len(prediction.overlapping),
        "maps": list(prediction.maps),
        "detections": [_told(detection) for detection in prediction.detections],
        "parameters": dict(prediction.parameters),
        "incomplete": list(prediction.incomplete),
        "certainty": [[int(value), float(sure)] for value, sure in prediction.certainty.items()],
        "classes": {name: [int(index), float(sure)] for name, (index, sure) in prediction.classes.items()},
    }


def _told(detection: Detection) -> Message:
    return {
        "name": detection.name,
        "box": [[int(low), int(high)] for low, high in detection.box],
        "centre": [float(place) for place in detection.centre],
        "confidence": float(detection.confidence),
        "value": None if detection.value is None else int(detection.value),
        "laterality": detection.laterality,
        "measurements": {name: float(value) for name, value in detection.measurements.items()},
    }


def read_prediction(message: Message, folder: Path, grid: Grid, manifest: Manifest) -> Prediction:
    """Return the prediction whose arrays are in `folder`.

    Raises:
        ModelRefused: something of it is not of the grid, not a number, or not among the manifest's outputs.
    """
    try:
        return _read(message, folder, grid, manifest)
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError, SyntaxError, OverflowError) as error:
        raise ModelRefused(f"{manifest.name}: what the model says cannot be read ({type(error).__name__})") from error


def _read(message: Message, folder: Path, grid: Grid, manifest: Manifest) -> Prediction:
    outputs = manifest.outputs
    layers = _whole(message["layers"], 0, _MOST_LAYERS)

    def labels(name: str) -> npt.NDArray[np.uint8]:
        return _array(folder / f"{name}.npy", np.dtype(np.uint8), grid.shape)

    return Prediction(
        labels=labels("labels") if message["labels"] else None,
        overlapping=tuple(labels(f"layer-{number}") for number in range(layers)),
        instances=_array(folder / "instances.npy", np.dtype(np.uint16), grid.shape) if message["instances"] else None,
        maps={
            _known(name, outputs.maps): _finite(_array(folder / f"map-{name}.npy", np.dtype(np.float32), grid.shape))
            for name in message["maps"]
        },
        detections=tuple(_detection(one, grid, manifest) for one in _few(message["detections"], _MOST_DETECTIONS)),
        parameters={
            _words(name): _words(value) for name, value in _few(list(message["parameters"].items()), _MOST_WORDS)
        },
        incomplete=tuple(_words(one) for one in _few(message["incomplete"], _MOST_WORDS)),
        certainty={
            _known(_whole(value, 0, 255), outputs.segments): _fraction(sure)
            for value, sure in _few(message["certainty"], 256)
        },
        classes={
            _known(name, outputs.classifications): (_whole(index, 0, 1_000_000), _fraction(sure))
            for name, (index, sure) in message["classes"].items()
        },
    )


def _detection(told: Message, grid: Grid, manifest: Manifest) -> Detection:
    box = [
        (_whole(low, 0, size - 1), _whole(high, low + 1, size))
        for (low, high), size in zip(told["box"], grid.shape, strict=True)
    ]
    centre = [_number(place) for place in told["centre"]]
    if told["laterality"] not in (None, "left", "right"):
        raise ValueError("laterality")
    return Detection(
        name=_known(told["name"], manifest.outputs.detections),
        box=(box[0], box[1], box[2]),
        centre=(centre[0], centre[1], centre[2]),
        confidence=_fraction(told["confidence"]),
        value=None if told["value"] is None else _whole(told["value"], 0, 65535),
        laterality=told["laterality"],
        measurements={_words(name): _number(value) for name, value in told["measurements"].items()},
    )


# -- nothing is believed ------------------------------------------------------------------------------------------


def _array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return an array from a file that somebody else may be changing: its own copy, of this type and shape.

    It is not mapped: a file that grows shorter would end this process. A link or a pipe is not opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("no file")
        if _header(file) != (shape, False, dtype):
            raise ValueError(f"{path.stem} is not {dtype} of shape {shape}")
        made = np.empty(shape, dtype)
        if file.readinto(made.reshape(-1).view(np.uint8).data) != made.nbytes:
            raise ValueError("too short")
    return made


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers: Mapping[tuple[int, int], Callable[[BinaryIO], Any]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = readers[np.lib.format.read_magic(file)](file)
    return header


def _finite(values: Array) -> Array:
    if not np.isfinite(values).all():
        raise ValueError("not finite")
    return values


def _known(name: Any, names: Any) -> Any:
    if name not in names:
        raise ValueError("unknown name")
    return name


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError("out of range")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError("no number")
    return float(value)


def _fraction(value: Any) -> float:
    return min(max(_number(value), 0.0), 1.0)


def _few(values: Any, most: int) -> list[Any]:
    if not isinstance(values, list) or len(values) > most:
        raise ValueError("too many")
    return values


def _words(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_WORDS or not value.isprintable():
        raise ValueError("no words")
    return value
