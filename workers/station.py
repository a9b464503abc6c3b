"""A thread that works on one thing at a time; who brings the next waits until it is free."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Station:
    """One place in the line of a worker."""

    def __init__(self, name: str) -> None:
        """Start the thread."""
        self._changed = threading.Condition()
        self._task: Callable[[], None] | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def take(self, task: Callable[[], None]) -> None:
        """Have `task` done, once the one before is; return as soon as it is begun. It must not raise."""
        with self._changed:
            self._changed.wait_for(lambda: self._task is None)
            self._task = task
            self._changed.notify_all()

    def is_free(self, *, within: float | None = None) -> bool:
        """Wait for the thread to have nothing to do, `within` seconds at most; return whether it has nothing."""
        with self._changed:
            return self._changed.wait_for(lambda: self._task is None, within)

    def close(self) -> None:
        """Let what was begun be finished, then end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._task is not None or self._is_closed)
                task = self._task
            if task is None:
                return
            try:
                task()
            finally:
                with self._changed:
                    self._task = None
                    self._changed.notify_all()
