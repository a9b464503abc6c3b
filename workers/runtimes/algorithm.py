"""Models that come with the node as code: the algorithm in workers.algorithms that bears the model's name."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path

import torch

import workers.algorithms
from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.device import choose_device
from workers.prediction import Model
from workers.weights import weights_path


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the algorithm, ready to run on `device`; one that has weights is given the paths of the files."""
    name = f"workers.algorithms.{manifest.name}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModelRefused(f"{manifest.name}: there is no algorithm of this name") from error
    files = [weights_path(folder, weights) for weights in manifest.weights]
    where = torch.device(choose_device(device))
    model: Model = module.load(dict(manifest.parameters), where, *([files] if files else []))
    return model


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the source of every algorithm: they build on each other."""
    digest = hashlib.sha256()
    for path in sorted(Path(workers.algorithms.__path__[0]).glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
