"""The files of a model: where they lie, and that they are those which the manifest names."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import structlog

from dicom_node.catalogue import MANIFEST, ModelFolder
from dicom_node.errors import ModelRefused
from dicom_node.manifest import Weights

log = structlog.get_logger()

_CHUNK = 1 << 20


def verify(found: ModelFolder) -> None:
    """Raise ModelRefused where a file of the model is missing or is not the one that the manifest names."""
    for weights in found.manifest.weights:
        with _opened(found, weights) as source:
            _require_digest(found, weights, source, None)


def furnish(found: ModelFolder, target: Path) -> None:
    """Copy the manifest and the files that it names into the folder `target`, and nothing else.

    The digests are those of the copies, which nobody else can write to: what is loaded later is what was verified.

    Raises:
        ModelRefused: a file is missing, or is not the one that the manifest names.
    """
    text = (found.folder / MANIFEST).read_bytes()
    if hashlib.sha256(text).hexdigest() != found.digest:
        raise ModelRefused(f"{found.manifest.name}: {MANIFEST} was changed while it was read")
    (target / MANIFEST).write_bytes(text)
    for weights in found.manifest.weights:
        path = target / weights.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(found, weights) as source, path.open("wb") as copy:
            _require_digest(found, weights, source, copy)


@contextmanager
def _opened(found: ModelFolder, weights: Weights) -> Iterator[BinaryIO]:
    try:
        with weights_path(found.folder, weights).open("rb") as file:
            yield file
    except OSError as error:
        way_out = (
            f"; `dicom-node models add {found.manifest.name}` installs it"
            if weights.url or found.manifest.origin
            else ""
        )
        raise ModelRefused(f"{found.manifest.name}: {weights.file}: {error.strerror}{way_out}") from error


def _require_digest(found: ModelFolder, weights: Weights, source: BinaryIO, copy: BinaryIO | None) -> None:
    digest = hashlib.sha256()
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    if digest.hexdigest() != weights.sha256:
        log.critical("model.tampered", model=found.manifest.name, file=weights.file)
        raise ModelRefused(f"{found.manifest.name}: {weights.file} is not the file that the manifest names (sha256)")


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
