"""Model folders made ready to run: manifest read, weights' digest verified, loaded once and kept."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from dicom_node.catalogue import ModelFolder, read_model
from dicom_node.errors import ModelRefused, NodeError
from dicom_node.manifest import CONTAINED, RUNS_CODE, Manifest
from workers.cell import ContainedModel
from workers.containment import Walls, walls
from workers.device import choose_device, is_gpu, memory_megabytes
from workers.prediction import Grid, Model
from workers.scratch import sweep
from workers.weights import furnish, verify

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A loaded model; `digest` is the SHA-256 (hex) over its manifest, weights and code."""

    manifest: Manifest
    digest: str
    model: Model


class Bundles:
    """The models that this worker has loaded, by folder and digest; those that share memory, the last used last."""

    def __init__(self, *, device: str, budget: int = 0, found: Walls | None = None) -> None:
        """Load onto `device`: auto, cpu or cuda:N.

        `budget` is what contained models may hold together, in MiB: of the GPU's memory what their manifests say,
        without a GPU what they are measured to hold. 0 is half of the machine's memory, or all of the GPU's.
        """
        self._device = device
        self._budget = budget
        self._walls = walls() if found is None else found
        self._loaded: dict[tuple[Path, str], Bundle] = {}
        self._lock = threading.Lock()
        self._warned = False
        weakref.finalize(self, _end, self._loaded)  # whoever forgets to close leaves no files behind
        sweep()

    def get(self, folder: Path) -> Bundle:
        """Return the model in `folder`, loaded; raise ModelRefused where it cannot be trusted or run."""
        found = read_model(folder)
        key = (found.folder, found.digest)
        with self._lock:
            bundle = self._loaded.pop(key, None) or self._load(found)
            self._loaded[key] = bundle
            if isinstance(bundle.model, ContainedModel):
                self._make_room(bundle)
                bundle.model.start()
                self._make_room(bundle)
            return bundle

    def warm(self, folder: Path) -> None:
        """Load a model before it is asked for, unless one that is loaded has had to make room already."""
        if any(model.pid is None for _, model in list(self._contained())):
            return
        try:
            self.get(folder)
        except NodeError as error:  # its first job fails in the same way, and says so on record
            log.warning("model.not_warmed", model=folder.name, reason=str(error))

    def prepare(self, found: ModelFolder, grid: Grid) -> None:
        """Have a model that is loaded get ready for a grid; waits for no other that is being loaded."""
        bundle = self._loaded.get((found.folder, found.digest))
        if bundle is not None and isinstance(bundle.model, ContainedModel):
            bundle.model.prepare(grid)

    def close(self) -> None:
        """End every contained model."""
        with self._lock:
            _end(self._loaded)
            self._loaded.clear()

    def _load(self, found: ModelFolder) -> Bundle:
        manifest = found.manifest
        runtime = _runtime(manifest)
        if manifest.runtime in CONTAINED:
            self._require_walls(manifest)
            packages: Sequence[Path] = getattr(runtime, "packages", lambda manifest: ())(manifest)
            device = choose_device(self._device)
            model: Model = ContainedModel(
                manifest, lambda folder: furnish(found, folder), device, self._walls, packages
            )
        else:
            verify(found)
            model = runtime.load(manifest, found.folder, self._device)
        code: str = runtime.code_digest(manifest)
        digest = hashlib.sha256(f"{found.digest} {code}".encode()).hexdigest()
        log.info("model.loaded", model=manifest.name, version=manifest.version, digest=digest[:16])
        return Bundle(manifest, digest, model)

    def _require_walls(self, manifest: Manifest) -> None:
        lacking = self._walls.missing
        if lacking and manifest.runtime in RUNS_CODE:
            raise ModelRefused(
                f"{manifest.name}: runtime {manifest.runtime!r} can run code, and this machine cannot contain it: "
                f"it lacks {lacking}"
            )
        if lacking and not self._warned:
            self._warned = True
            log.warning("model.not_contained", lacking=lacking)

    def _make_room(self, wanted: Bundle) -> None:
        """End the contained models that were used longest ago until all fit into the budget, never the one wanted."""
        device = choose_device(self._device)
        on_gpu = is_gpu(device)
        budget = self._budget or memory_megabytes(device) // (1 if on_gpu else 2)
        held = {
            id(bundle): float(bundle.manifest.limits.gpu_megabytes) if on_gpu else model.resident_megabytes
            for bundle, model in self._contained()
            if model.pid is not None or bundle is wanted
        }
        for bundle, model in list(self._contained()):
            if sum(held.values()) <= budget:
                return
            if bundle is not wanted and id(bundle) in held:
                log.info("model.ended", model=bundle.manifest.name, reason="memory is needed")
                model.end()
                del held[id(bundle)]

    def _contained(self) -> Iterator[tuple[Bundle, ContainedModel]]:
        """Yield the contained models, the one that was used longest ago first."""
        for bundle in self._loaded.values():
            if isinstance(bundle.model, ContainedModel):
                yield bundle, bundle.model


# -- what is loaded is what was verified --------------------------------------------------------------------------


def _end(loaded: Mapping[tuple[Path, str], Bundle]) -> None:
    for bundle in loaded.values():
        if isinstance(bundle.model, ContainedModel):
            bundle.model.end()


def _runtime(manifest: Manifest) -> Any:
    name = f"workers.runtimes.{manifest.runtime}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModelRefused(f"{manifest.name}: there is no runtime {manifest.runtime!r}") from error
