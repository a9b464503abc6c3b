"""Model folders made ready to run: manifest read, weights' digest verified, loaded once and kept."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from dicom_node.catalogue import ModelFolder, read_model
from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest, Weights
from workers.prediction import Model

log = structlog.get_logger()

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded model; `digest` is the SHA-256 (hex) over its manifest, weights and code."""

    manifest: Manifest
    digest: str
    model: Model


class Bundles:
    """The models that this worker has loaded, by folder and digest."""

    def __init__(self, *, device: str) -> None:
        """Load onto `device`: auto, cpu or cuda:N."""
        self._device = device
        self._loaded: dict[tuple[Path, str], Bundle] = {}
        self._lock = threading.Lock()

    def get(self, folder: Path) -> Bundle:
        """Return the model in `folder`, loaded; raise ModelRefused where it cannot be trusted or run."""
        found = read_model(folder)
        key = (found.folder, found.digest)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = self._load(found)
            return self._loaded[key]

    def _load(self, found: ModelFolder) -> Bundle:
        verify(found)
        runtime = _runtime(found.manifest)
        model = runtime.load(found.manifest, found.folder, self._device)
        code: str = runtime.code_digest(found.manifest)
        digest = hashlib.sha256(f"{found.digest} {code}".encode()).hexdigest()
        log.info("model.loaded", model=found.manifest.name, version=found.manifest.version, digest=digest[:16])
        return Bundle(found.manifest, digest, model)


def verify(found: ModelFolder) -> None:
    """Raise ModelRefused where a file of the model is missing or is not the one that the manifest names."""
    for weights in found.manifest.weights:
        path = weights_path(found.folder, weights)
        digest = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise ModelRefused(
                f"{found.manifest.name}: {weights.file}: {error.strerror}{_way_out(found, weights)}"
            ) from (error)
        if digest.hexdigest() != weights.sha256:
            log.critical("model.tampered", model=found.manifest.name, file=weights.file)
            raise ModelRefused(
                f"{found.manifest.name}: {weights.file} is not the file that the manifest names (sha256)"
            )


def weights_path(folder: Path, weights: Weights) -> Path:
    """Return where a file of a model lies: in its folder, or in the installed package that brings it."""
    if not weights.distribution:
        path = folder / weights.file
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ModelRefused(f"{folder.name}: weights.file {weights.file} lies outside the model's folder")
        return path
    try:
        return Path(str(importlib.metadata.distribution(weights.distribution).locate_file(weights.file)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelRefused(
            f"{folder.name}: the package {weights.distribution} is not installed: pip install {weights.distribution}"
        ) from error


def _way_out(found: ModelFolder, weights: Weights) -> str:
    return f"; `dicom-node models add {found.manifest.name}` fetches it" if weights.url else ""


def _runtime(manifest: Manifest) -> Any:
    name = f"workers.runtimes.{manifest.runtime}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModelRefused(f"{manifest.name}: there is no runtime {manifest.runtime!r}") from error
