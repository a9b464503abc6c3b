"""What comes one by one and is worked on in groups."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Gathering(Generic[Item]):
    """Items from many threads for one that takes them, in their order and in groups, and is woken once for a group.

    A queue wakes whoever waits for every item: with a thread for each, that costs more than the items do.
    """

    def __init__(self, *, most: int, seconds: float) -> None:
        """Let groups of at most `most` come together, within `seconds` of their first item."""
        self._most = most
        self._seconds = seconds
        self._items: list[Item] = []
        self._lock = threading.Lock()
        self._some, self._at_once = threading.Event(), threading.Event()
        self._is_closed = False

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._items)

    def put(self, item: Item, *, at_once: bool = False) -> None:
        """Add an item; `at_once` has it taken, with all before it, without waiting for others."""
        with self._lock:
            self._items.append(item)
            if len(self._items) == 1:
                self._some.set()
            if at_once or len(self._items) == self._most:
                self._at_once.set()

    def take(self) -> list[Item]:
        """Wait for a group, and return it; it is empty where there is none and, as all is closed, will be none."""
        self._some.wait()
        self._at_once.wait(self._seconds)
        return self._taken(self._most)

    def take_all(self) -> list[Item]:
        """Return what there is, without waiting."""
        return self._taken(len(self._items))

    def _taken(self, number: int) -> list[Item]:
        with self._lock:
            group, self._items = self._items[:number], self._items[number:]
            if not self._items and not self._is_closed:
                self._some.clear()
                self._at_once.clear()
            return group

    def close(self) -> None:
        """Let nobody wait any more."""
        with self._lock:
            self._is_closed = True
            self._some.set()
            self._at_once.set()
