"""The door for C-STORE: shut while free space is below the watermark, open again by itself a margin above it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from dicom_node.errors import SpoolFull

log = structlog.get_logger()

_LOOK_AGAIN = 0.25  # seconds that an answer of the file system holds
_MARGIN = 0.1  # share of the watermark above it at which the door opens: it must not flap with every file


class Watermark:
    """Whether there is room for what arrives; results and the ledger may use the room below.

    Free space is asked for a few times a second; what is let in meanwhile is counted, so that however fast it comes
    the door shuts in time.
    """

    def __init__(
        self,
        folder: Path,
        minimum_free: int,
        *,
        free_of: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch the file system of `folder`; `minimum_free` is in bytes, 0 for a door that is always open."""
        self._folder = folder
        self._shuts_below = minimum_free
        self._opens_at = minimum_free + int(minimum_free * _MARGIN)
        self._free_of = free_of
        self._clock = clock
        self._lock = threading.Lock()
        self._is_open = self._told_open = True
        self._free = 0
        self._asked_at = float("-inf")

    def require_room(self, size: int = 0) -> None:
        """Count `size` bytes, as far as it is known yet, as about to be written.

        Raises SpoolFull where the door is shut or they would shut it, OSError where the file system does not answer.
        """
        if not self._shuts_below:
            return
        with self._lock:
            now = self._clock()
            is_fresh = now - self._asked_at < _LOOK_AGAIN
            if not is_fresh or (self._is_open and self._free - size < self._shuts_below):
                self._ask(now)
            if not self._is_open or self._free - size < self._shuts_below:
                raise SpoolFull("Out of resources: disk space is below the watermark")
            self._free -= size

    def tell(self, note: Callable[[str, int], None]) -> None:
        """Ask how much is free; have `note` write down what has changed since it last could: the event, free bytes."""
        if not self._shuts_below:
            return
        with self._lock:
            self._ask(self._clock())
            is_open, free = self._is_open, self._free
        if is_open != self._told_open:
            note(_event(is_open), free)
            self._told_open = is_open

    def _ask(self, now: float) -> None:
        self._free, self._asked_at = self._free_of(self._folder), now
        is_open = self._free >= (self._shuts_below if self._is_open else self._opens_at)
        if is_open != self._is_open:
            self._is_open = is_open
            (log.info if is_open else log.error)(_event(is_open), free_megabytes=self._free // 2**20)


def _event(is_open: bool) -> str:
    return "door.opened" if is_open else "door.shut"
