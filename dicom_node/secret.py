"""Secrets that the node makes for itself: files in the storage folder that nobody else can read."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from dicom_node.errors import SettingsError


def own_secret(folder: Path, name: str) -> str:
    """Return the secret in `folder`/`name`, 64 hexadecimal digits; make it first where there is none.

    Several processes may ask at once and get the same. Raises SettingsError where it can be neither read nor made.
    """
    path = folder / name
    try:
        if not path.exists():
            _make(folder, path)
        found = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from error
    if len(found) < 32:
        raise SettingsError(f"{path}: too short for a secret; delete it, and the node makes another")
    return found


def _make(folder: Path, path: Path) -> None:
    """Write a new secret under another name, then link it: whoever is first wins, and nobody reads half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{path.name}.", encoding="ascii") as made:  # mode 0600
        made.write(secrets.token_hex(32) + "\n")
        made.flush()
        os.fsync(made.fileno())
        try:
            os.link(made.name, path)
        except FileExistsError:
            return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
