"""What a contained model is given to look at, where it may read it; and beside that, where it may not, what comes next.

A model would wait while a large grid is written, so that is done before it is its turn: while the grid before is at
the model, or while the node waits to be sure that a series is complete.
"""

from __future__ import annotations

import threading
import weakref
from itertools import count
from pathlib import Path

from workers import scratch
from workers.passing import Message, write_grid
from workers.prediction import Grid


class Handing:
    """Brings grids into the folder that a model reads."""

    def __init__(self, given: Path, aside: Path) -> None:
        """Give into `given`, which the model reads; what it is not to see yet lies in `aside`. Both are made."""
        self._given = given
        self._aside = aside
        for folder in (given, aside):
            folder.mkdir()
        self._lock = threading.Lock()
        self._numbers = count()
        self._written: dict[int, tuple[Path, Message]] = {}  # by the identity of a grid, for as long as it lives
        self._is_closed = False

    def prepare(self, grid: Grid) -> None:
        """Write down a grid that will be given; what was written goes with the grid. Raises OSError."""
        with self._lock:
            if self._is_closed or id(grid) in self._written:
                return
            folder = self._aside / str(next(self._numbers))
            weakref.finalize(grid, self._forget, id(grid), folder)
            self._written[id(grid)] = folder, write_grid(grid, folder)

    def give(self, grid: Grid, *within: str) -> Message:
        """Have a grid where the model reads it, or in a folder `within`; return the message that goes with it."""
        into = self._given.joinpath(*within)
        with self._lock:
            folder, message = self._written.pop(id(grid), (None, None))
            if folder is None or message is None:
                return write_grid(grid, into)
            into.mkdir(exist_ok=True)
            for path in folder.iterdir():
                path.replace(into / path.name)  # a model may have kept what it was given before: that file stays
            return message

    def clear(self) -> None:
        """Delete what was given."""
        scratch.empty(self._given)

    def close(self) -> None:
        """Write nothing more, so that the folders can be removed."""
        with self._lock:
            self._is_closed = True

    def _forget(self, which: int, folder: Path) -> None:
        # not under the lock: the thread that lets go of a grid may hold it
        self._written.pop(which, None)
        scratch.remove(folder)
