"""Weights of TensorFlow.js in torch: the same numbers come out, layer for layer, as by the definition."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load as read_safetensors
from safetensors.torch import load as load_safetensors

from dicom_node.catalogue import default_folder, read_model
from dicom_node.conversion import safetensors, tfjs_meshnet
from dicom_node.errors import ModelRefused
from workers.architectures import build


def published(dilations, channels, classes, activation, normalised, seed=3):
    """A MeshNet as TensorFlow.js keeps it, and its weights by layer."""
    random = np.random.default_rng(seed)
    layers, entries, weights, blob = [{"class_name": "InputLayer", "config": {"name": "input"}}], [], [], b""
    widths = [1, *[channels] * len(dilations), classes]
    for number, dilation in enumerate([*dilations, 0]):
        last = number == len(dilations)
        name = "output" if last else f"conv3d_{number}" + ("_gn" if normalised else "")
        size = (1, 1, 1) if last else (3, 3, 3)
        kernel = random.normal(size=(*size, widths[number], widths[number + 1]), scale=0.3).astype("<f4")
        bias = random.normal(size=widths[number + 1]).astype("<f4") if last or not normalised else None
        layers.append({"class_name": "Conv3D", "config": {"name": name}})
        if not last:
            layers.append({"class_name": "Activation", "config": {"activation": activation}})
        for kind, values in (("kernel", kernel), ("bias", bias)):
            if values is not None:
                entries.append({"name": f"{name}/{kind}", "shape": list(values.shape), "dtype": "float32"})
                blob += values.tobytes()
        weights.append((kernel, bias, dilation or 1))
    topology = {"model_config": {"config": {"layers": layers}}}
    model = {"modelTopology": topology, "weightsManifest": [{"paths": ["model.bin"], "weights": entries}]}
    return {"model.json": json.dumps(model).encode(), "model.bin": blob}, weights


def convolved(values, kernel, bias, dilation):
    """A 3D convolution by its definition, channels last, zeros outside."""
    size, reach = values.shape[:3], dilation * (kernel.shape[0] // 2)
    padded = np.pad(values, [(reach, reach)] * 3 + [(0, 0)])
    made = np.zeros((*size, kernel.shape[4]))
    for place in np.ndindex(kernel.shape[:3]):
        start = [index * dilation for index in place]
        cut = padded[tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))]
        made += cut @ kernel[place]
    return made if bias is None else made + bias


def evaluated(values, weights, activation, normalised):
    erf = np.vectorize(math.erf)
    for number, (kernel, bias, dilation) in enumerate(weights):
        values = convolved(values, kernel.astype(float), bias, dilation)
        if number == len(weights) - 1:
            return values
        if normalised:
            values = (values - values.mean(axis=(0, 1, 2))) / np.sqrt(values.var(axis=(0, 1, 2)) + 1e-5)
        if activation == "elu":
            values = np.where(values > 0, values, np.expm1(values))
        else:
            values = 0.5 * values * (1 + erf(values / np.sqrt(2)))
    return values


@pytest.mark.parametrize(("activation", "normalised"), [("elu", False), ("gelu", True)])
def test_torch_says_what_the_published_weights_say(activation, normalised):
    files, weights = published([1, 2, 3], 4, 3, activation, normalised)
    network = build(
        "meshnet",
        {"classes": 3, "channels": 4, "dilations": [1, 2, 3], "activation": activation, "normalised": normalised},
    ).eval()
    network.load_state_dict(load_safetensors(tfjs_meshnet(files)))
    volume = np.random.default_rng(5).random((9, 7, 8)).astype(np.float32)

    with torch.inference_mode():
        said = network(torch.from_numpy(volume)[None, None])[0].numpy()

    wanted = evaluated(volume[..., None].astype(float), weights, activation, normalised)
    assert np.abs(said - wanted.transpose(3, 0, 1, 2)).max() < 1e-4


def defined(model, content, values):
    """Yield what each layer of a published `model.json` says of `values`, in float64; its norms have no weights."""
    weights, place = {}, 0
    for entry in model["weightsManifest"][0]["weights"]:
        count = math.prod(entry["shape"])
        weights[entry["name"]] = np.frombuffer(content, "<f4", count, place).reshape(entry["shape"]).astype(float)
        place += 4 * count
    erf = np.vectorize(math.erf)
    said = {
        "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
        "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    }
    for layer in model["modelTopology"]["model_config"]["config"]["layers"][1:]:
        config = layer["config"]
        if layer["class_name"] == "Activation":
            values = said[config["activation"]](values)
            continue
        name, dilation = config["name"], config["dilation_rate"][0]
        values = convolved(values, weights[f"{name}/kernel"], weights.get(f"{name}/bias"), dilation)
        yield values
        if name.endswith("_gn"):
            values = (values - values.mean(axis=(0, 1, 2))) / np.sqrt(values.var(axis=(0, 1, 2)) + 1e-5)


@pytest.mark.parametrize(("name", "folder"), [("brain_mask", "mindgrab"), ("mr_brain_structures", "model30chan18cls")])
def test_the_published_networks_say_layer_for_layer_what_their_definition_says(shared_data, name, folder):
    files = {path.name: path.read_bytes() for path in (shared_data / "brainchop" / folder).iterdir()}
    manifest = read_model(default_folder() / name).manifest
    converted = tfjs_meshnet(files)
    network = build(manifest.architecture.name, manifest.architecture.arguments).eval()
    network.load_state_dict(load_safetensors(converted))
    said = []
    for layer in [*network.layers, network.output]:
        layer.register_forward_hook(lambda layer, given, made: said.append(made[0].numpy().copy()))
    volume = np.random.default_rng(1).random((14, 12, 13)).astype(np.float32)

    with torch.inference_mode():
        network(torch.from_numpy(volume)[None, None])

    wanted = list(defined(json.loads(files["model.json"]), files["model.bin"], volume[..., None].astype(float)))
    assert hashlib.sha256(converted).hexdigest() == manifest.weights[0].sha256
    assert len(said) == len(wanted)
    for ours, theirs in zip(said, wanted, strict=True):
        assert np.abs(ours - theirs.transpose(3, 0, 1, 2)).max() < 1e-5 * np.abs(theirs).max()


def test_the_same_files_make_the_same_bytes():
    files, _ = published([1, 2], 3, 2, "elu", False)

    assert tfjs_meshnet(files) == tfjs_meshnet(dict(reversed(files.items())))


def test_the_bytes_are_safetensors():
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros(1, np.float32)}

    read = read_safetensors(safetensors(arrays))

    assert {name: values.tolist() for name, values in read.items()} == {name: v.tolist() for name, v in arrays.items()}


@pytest.mark.parametrize("broken", ["cut", "no json", "another kind"])
def test_files_of_another_kind_are_refused(broken):
    files, _ = published([1, 2], 3, 2, "elu", False)
    files = {
        "cut": {**files, "model.bin": files["model.bin"][:-4]},
        "no json": {**files, "model.json": b"<html>"},
        "another kind": {**files, "model.json": b'{"modelTopology": {}}'},
    }[broken]

    with pytest.raises(ModelRefused, match="no MeshNet"):
        tfjs_meshnet(files)
