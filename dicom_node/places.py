"""How many associations are open, and whose: in one process, or in all that receive, in memory that they share."""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections import Counter
from pathlib import Path

import numpy as np

from dicom_node.config import Settings

_TITLE = 16  # bytes of an AE title (PS3.5 6.2)


class Places:
    """The open associations of one process; nobody else has any."""

    def __init__(self) -> None:
        """Begin with none."""
        self._open: Counter[str] = Counter()

    def __enter__(self) -> None:
        """Let nobody else take a place until the end."""

    def __exit__(self, *_: object) -> None:
        """Let others."""

    def number(self, calling_ae_title: str | None = None) -> int:
        """Return how many are open, of one AE title or in all."""
        return self._open.total() if calling_ae_title is None else self._open[calling_ae_title]

    def take(self, calling_ae_title: str) -> None:
        """Count one more."""
        self._open[calling_ae_title] += 1

    def give_back(self, calling_ae_title: str) -> None:
        """Count one less."""
        self._open[calling_ae_title] -= 1
        self._open += Counter()  # what is left of nobody need not be kept

    def clear(self, part: int | None = None) -> None:
        """Count none: of a process that has ended, or of all."""
        self._open.clear()


class SharedPlaces(Places):
    """The open associations of several processes: each has a row of AE titles in a file that all have mapped.

    What a process that was killed has left in its row is cleared by whoever buries it.
    """

    def __init__(self, path: Path, *, parts: int, part: int, most: int) -> None:
        """Count in row `part` of so many; `most` is how many associations there may be."""
        size = parts * most * _TITLE
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._descriptor).st_size < size:  # never shorter: somebody may have mapped it
            os.ftruncate(self._descriptor, size)
        self._rows = np.ndarray((parts, most), dtype=f"S{_TITLE}", buffer=mmap.mmap(self._descriptor, size))
        self._mine = self._rows[part]
        weakref.finalize(self, os.close, self._descriptor)

    def __enter__(self) -> None:
        """Let nobody else take a place until the end; a process that is killed meanwhile lets go."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        """Let others."""
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def number(self, calling_ae_title: str | None = None) -> int:
        """Return how many are open, of one AE title or in all."""
        taken = self._rows != b"" if calling_ae_title is None else self._rows == _key(calling_ae_title)
        return int(np.count_nonzero(taken))

    def take(self, calling_ae_title: str) -> None:
        """Count one more."""
        self._mine[int(np.argmin(self._mine != b""))] = _key(calling_ae_title)

    def give_back(self, calling_ae_title: str) -> None:
        """Count one less."""
        self._mine[int(np.argmax(self._mine == _key(calling_ae_title)))] = b""

    def clear(self, part: int | None = None) -> None:
        """Count none: of a process that has ended, or of all."""
        self._rows[slice(None) if part is None else part] = b""


def places_of(settings: Settings, *, part: int = 0) -> Places:
    """Return where process number `part` of those that receive counts its associations."""
    receive = settings.receive
    if receive.processes == 1:
        return Places()
    path = settings.node.storage / "associations"
    return SharedPlaces(path, parts=receive.processes, part=part, most=receive.maximum_associations)


def _key(calling_ae_title: str) -> bytes:
    """Return what stands for an AE title: one that names nobody, which the standard forbids, has a sign, too."""
    return calling_ae_title.encode("ascii", "replace")[:_TITLE] or b"\x01"
