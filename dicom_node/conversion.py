"""Published weights in another form become safetensors: the same numbers, byte for byte the same file each time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dicom_node.errors import ModelRefused

Tensors = dict[str, npt.NDArray[np.float32]]


def tfjs_meshnet(files: Mapping[str, bytes]) -> bytes:
    """Return the safetensors of a MeshNet that TensorFlow.js keeps as `model.json` and `model.bin`.

    Kernels `(depth, height, width, in, out)` become `(out, in, depth, height, width)`; the last convolution is
    `output`, the others `layers.N`.

    Raises:
        ModelRefused: the files are not of that kind.
    """
    try:
        topology = json.loads(files["model.json"])
        weights = _weights(topology["weightsManifest"], files)
        layers = topology["modelTopology"]["model_config"]["config"]["layers"]
        convolutions = [layer["config"]["name"] for layer in layers if layer["class_name"] == "Conv3D"]
        tensors: Tensors = {}
        for number, name in enumerate(convolutions):
            target = "output" if number == len(convolutions) - 1 else f"layers.{number}"
            tensors[f"{target}.weight"] = np.ascontiguousarray(weights[f"{name}/kernel"].transpose(4, 3, 0, 1, 2))
            if f"{name}/bias" in weights:
                tensors[f"{target}.bias"] = weights[f"{name}/bias"]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ModelRefused(f"model.json and model.bin are no MeshNet of TensorFlow.js: {error!r}") from error
    return safetensors(tensors)


def _weights(manifest: Sequence[Mapping[str, Any]], files: Mapping[str, bytes]) -> Tensors:
    found: Tensors = {}
    for group in manifest:
        content = b"".join(files[path] for path in group["paths"])
        place = 0
        for entry in group["weights"]:
            if entry["dtype"] != "float32":
                raise ValueError(f"{entry['name']} is {entry['dtype']}")
            count = int(np.prod(entry["shape"]))
            values = np.frombuffer(content, "<f4", count, place)
            found[entry["name"]] = values.reshape(entry["shape"]).astype(np.float32)
            place += 4 * count
        if place != len(content):
            raise ValueError(f"{len(content) - place} bytes left over")
    return found


def safetensors(tensors: Mapping[str, npt.NDArray[np.float32]]) -> bytes:
    """Return a safetensors file of float32 arrays, in the order of their names."""
    header: dict[str, Any] = {}
    place = 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (
        struct.pack("<Q", len(text))
        + text
        + b"".join(tensors[name].astype("<f4").tobytes() for name in sorted(tensors))
    )


CONVERTERS: Mapping[str, Callable[[Mapping[str, bytes]], bytes]] = {"tfjs_meshnet": tfjs_meshnet}
"""What `[origin] converter` may name."""
