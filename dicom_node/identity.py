"""What a node calls itself in the ledger: the name that it had when it first used its storage folder.

Machines are renamed, containers get a new host name each time, ports move. A node that came back under another name
would not know what its earlier life held, and a series held open by a dead association would wait for ever.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from dicom_node.errors import Unavailable

_LONGEST = 64  # characters that the ledger holds
_TAIL = 1 + 16 + 1 + 5  # of these, for AE title and port


def identity(storage: Path, *, host: str, ae_title: str, port: int) -> str:
    """Return the name in `node.id` of the storage folder; write one there where there is none.

    Raises Unavailable where the folder cannot be read or written.
    """
    path = storage / "node.id"
    try:
        name = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if not name:  # none, or a power cut took it
            name = f"{host[: _LONGEST - _TAIL]}:{ae_title}:{port}"
            _write(path, name)
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"The storage folder's node.id cannot be read or written: {type(error).__name__}") from error
    return name


def identity_of_part(node_id: str, part: int) -> str:
    """Return what a further process of a node that receives calls itself in the ledger."""
    name = f"{node_id}#{part}"
    if len(name) <= _LONGEST:
        return name
    # cut off, two nodes of one ledger might bear one name
    return f"{hashlib.sha256(node_id.encode()).hexdigest()[: _LONGEST - 8]}#{part}"


def _write(path: Path, name: str) -> None:
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(f"{name}\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
