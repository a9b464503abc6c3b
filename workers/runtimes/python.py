"""An installed package's own model: `parameters.entry_point = "package.module:function"`.

The function is called with a `workers.prediction.Grid` and returns a `workers.prediction.Prediction`. Where it takes
them by name, it is also given `parameters` (the manifest's, without the entry point), `folder` (the `pathlib.Path` of
the files that the manifest names), `device` (`"cpu"` or `"cuda:N"`) and `progress` (call it with the finished part, 0
to 1). It may raise `dicom_node.errors.NotApplicable`. A class will do: it is made once, with `parameters`, `folder` and
`device`, and then called. The package is imported in the contained process only, never by the node.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.device import choose_device
from workers.prediction import Grid, Model, Prediction, Progress

_KEY = "entry_point"


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the entry point as a model; raise ModelRefused where it does not exist."""
    package, module, name = _entry_point(manifest)
    try:
        target: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelRefused(
            f"{manifest.name}: parameters.{_KEY}: {module}:{name} cannot be imported ({type(error).__name__}); "
            f"is the package {package} installed where the node's worker runs?"
        ) from error
    parameters = {key: value for key, value in manifest.parameters.items() if key != _KEY}
    offered = {"parameters": parameters, "folder": folder, "device": choose_device(device)}
    if inspect.isclass(target):
        made: Any = target(**_taken(target, offered))
        return _Called(manifest.name, made, {})
    return _Called(manifest.name, target, offered)


class _Called:
    """A function, or a made object, as a model."""

    def __init__(self, name: str, target: Callable[..., object], offered: Mapping[str, object]) -> None:
        self._name = name
        self._target = target
        self._offered = offered

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Predict; raise ModelRefused where what comes back is no Prediction."""
        answer = self._target(grid, **_taken(self._target, {**self._offered, "progress": progress}))
        if not isinstance(answer, Prediction):
            raise ModelRefused(f"{self._name}: the entry point returned {type(answer).__name__}, no Prediction")
        return answer


def _taken(target: Callable[..., object], offered: Mapping[str, object]) -> dict[str, object]:
    """Return what of `offered` a function has parameters for."""
    wanted = inspect.signature(target).parameters
    return {name: value for name, value in offered.items() if name in wanted}


def _entry_point(manifest: Manifest) -> tuple[str, str, str]:
    """Return package, module and name of the entry point."""
    module, _, name = str(manifest.parameters.get(_KEY, "")).partition(":")
    if not module or not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ModelRefused(f'{manifest.name}: parameters.{_KEY}: write it as "package.module:function"')
    return module.split(".")[0], module, name


def packages(manifest: Manifest) -> tuple[Path, ...]:
    """Return the folder (or the one file) of the package, which is found and not imported."""
    package, _, _ = _entry_point(manifest)
    found = importlib.util.find_spec(package)
    if found is None:
        raise ModelRefused(
            f"{manifest.name}: parameters.{_KEY}: there is no package {package}; install it where the worker runs"
        )
    if found.submodule_search_locations:
        return tuple(Path(place).resolve() for place in found.submodule_search_locations)
    return (Path(found.origin).resolve(),) if found.origin and found.has_location else ()


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the source of the package."""
    digest = hashlib.sha256()
    for place in packages(manifest):
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(path.relative_to(place.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
