"""The model folders that exist: name to manifest and digest. Nothing here loads or runs a model."""

from __future__ import annotations

import difflib
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dicom_node.errors import SettingsError
from dicom_node.manifest import Manifest, parse

MANIFEST = "model.toml"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One folder with its manifest; `digest` is the SHA-256 (hex) of the manifest, which names the weights'."""

    folder: Path
    manifest: Manifest
    digest: str


def default_folder() -> Path:
    """Return where models lie: beside a source checkout, else where the wheel puts them."""
    beside = Path(__file__).resolve().parent.parent / "models"
    return beside if beside.is_dir() else Path(sys.prefix) / "share" / "dicom-node" / "models"


def read_model(folder: Path) -> ModelFolder:
    """Read the manifest in `folder`; raise SettingsError that names file and key."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 at byte {error.start}") from error
    manifest = parse(text, where=str(path))
    if manifest.name != folder.name:
        raise SettingsError(f"{path}: name: {manifest.name!r} is not the name of its folder, {folder.name!r}")
    return ModelFolder(folder, manifest, hashlib.sha256(text.encode()).hexdigest())


def read_catalogue(folder: Path) -> Mapping[str, ModelFolder]:
    """Read every model in `folder`, by name; a folder without a manifest is not a model."""
    return {path.parent.name: read_model(path.parent) for path in sorted(folder.glob(f"*/{MANIFEST}"))}


def suggestion(word: str, known: Mapping[str, object] | list[str]) -> str:
    """Return ` (did you mean "x"?)` for the nearest known word, or the list of all of them."""
    near = difflib.get_close_matches(word, list(known), n=1)
    if near:
        return f' (did you mean "{near[0]}"?)'
    return f" (there is: {', '.join(sorted(known))})" if known else " (there is none)"
