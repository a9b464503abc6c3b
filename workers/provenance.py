"""A digest of code: a result names the very lines that made it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

_OF_NETWORKS = (
    "workers.preparing",
    "workers.lattice",
    "workers.windows",
    "workers.answering",
    "workers.network",
    "workers.runtimes",
    "workers.architectures",
)


def digest_of_networks() -> str:
    """Return the SHA-256 (hex) over everything that stands between a grid and what a network says of it."""
    return digest_of(_OF_NETWORKS)


def digest_of(modules: Iterable[str]) -> str:
    """Return the SHA-256 (hex) over the source of modules, of a package all its own."""
    digest = hashlib.sha256()
    for name in modules:
        for path in _sources(name):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _sources(name: str) -> list[Path]:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        return []
    origin = Path(found.origin)
    return sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
