"""Weights alone, as safetensors or a state_dict: the manifest names the network that they fill."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.architectures import build
from workers.device import choose_device
from workers.network import NetworkModel
from workers.prediction import Model
from workers.provenance import digest_of_networks

_WRAPPED = ("state_dict", "model_state_dict", "model")  # how training scripts pack it among other things


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the manifest's architecture with its weights; raise ModelRefused where they do not fit."""
    where = torch.device(choose_device(device))
    if manifest.architecture is None:
        raise ModelRefused(f"{manifest.name}: architecture: a state_dict needs the network that it fills")
    network = build(manifest.architecture.name, manifest.architecture.arguments)
    file = manifest.weights[0].file
    try:
        network.load_state_dict(_weights(folder / file))
    except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        # torch lists every key that differs: the first line says what kind of mistake it is
        raise ModelRefused(f"{manifest.name}: {file} does not fit {manifest.architecture.name}: {_first(error)}") from (
            error
        )
    network = network.eval().to(where)
    return NetworkModel(manifest, network, where, network.to)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    read: Any = torch.load(path, map_location="cpu", weights_only=True)
    for key in _WRAPPED:
        if isinstance(read, dict) and isinstance(read.get(key), dict):
            read = read[key]
    if not isinstance(read, dict) or not all(isinstance(value, torch.Tensor) for value in read.values()):
        raise ValueError("no state_dict is in it")
    return {str(name).removeprefix("module."): value for name, value in read.items()}


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300]


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the code that runs it."""
    return digest_of_networks()
