"""`torch.export` archives (.pt2). Loading one unpickles what is hidden in it: only ever done where it is contained."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from dicom_node.errors import ModelRefused, NodeError
from dicom_node.manifest import Manifest
from workers.device import choose_device
from workers.network import NetworkModel
from workers.prediction import Model
from workers.provenance import digest_of_networks


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the network in the first of the manifest's weights; raise ModelRefused where it is no such archive."""
    where = torch.device(choose_device(device))
    file = manifest.weights[0].file
    if not zipfile.is_zipfile(folder / file):
        raise ModelRefused(f"{manifest.name}: {file} is no archive of torch.export")
    try:
        program = torch.export.load(folder / file)
        network = program.module().to(where)
    except (NodeError, MemoryError):
        raise
    except Exception as error:  # an unpickler raises anything
        raise ModelRefused(
            f"{manifest.name}: {file} does not load here ({type(error).__name__}): "
            "export it with the torch that the node has"
        ) from error
    return NetworkModel(manifest, network, where, network.to)


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the code that runs it."""
    return digest_of_networks()
