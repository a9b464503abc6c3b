"""TorchScript: `torch.jit.save`d networks. They run operators of torch, no Python; contained all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.device import choose_device
from workers.network import NetworkModel
from workers.prediction import Model
from workers.provenance import digest_of_networks


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the network in the first of the manifest's weights; raise ModelRefused where it is no TorchScript."""
    where = torch.device(choose_device(device))
    path = folder / manifest.weights[0].file
    jit: Any = torch.jit  # untyped
    try:
        network = jit.load(str(path), map_location=where).eval()
    except (RuntimeError, ValueError) as error:
        raise ModelRefused(f"{manifest.name}: {manifest.weights[0].file} is no TorchScript that loads here") from error
    return NetworkModel(manifest, network, where, network.to)


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the code that runs it."""
    return digest_of_networks()
