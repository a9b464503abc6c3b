"""How long each stage of a job takes; what the ledger keeps of it, and `dicom-node history` shows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by stage, in the order of the stages."""

    def __init__(self) -> None:
        """Start with no stage."""
        self.seconds: dict[str, float] = {}
        self.began: dict[str, float] = {}  # when each stage began first, by the clock on the wall
        self._running: tuple[str, float] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as stage `name`, or as a further part of it."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """Begin stage `name`; the one that was begun before ends."""
        self.end()
        self.began.setdefault(name, round(time.time(), 3))
        self._running = name, time.perf_counter()

    def end(self) -> None:
        """End the stage that was begun."""
        if self._running is not None:
            name, started = self._running
            self._running = None
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` to stage `name`."""
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 4)
