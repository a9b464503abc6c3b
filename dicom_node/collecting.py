"""Data sets that pynetdicom collects: a bound for each, by what it belongs to, and one for all of them together."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from io import BytesIO
from typing import Any

_READ = 1 << 24  # bytes; a request about 100,000 instances has 13 MB
_LARGEST: Mapping[str, int] = {"C_STORE_RQ": _READ, "N_ACTION_RQ": _READ, "N_EVENT_REPORT_RQ": _READ}
_LARGEST_OTHER = 1 << 16  # of a message whose data set nobody reads
_ALWAYS = 1 << 19  # bytes that one may have, whatever the others hold
_TOGETHER = 1 << 26  # bytes that all may have beyond these


class Room:
    """The memory that the data sets of all connections have together."""

    def __init__(self, size: int = _TOGETHER) -> None:
        """Have `size` bytes to give."""
        self._left = size
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Take so many bytes; return whether they were there."""
        with self._lock:
            self._left -= size if (fits := size <= self._left) else 0
        return fits

    def give_back(self, size: int) -> None:
        """Have so many bytes again."""
        with self._lock:
            self._left += size

    @property
    def left(self) -> int:
        """Return how many bytes there are."""
        return self._left


class Collected(BytesIO):
    """A data set as it grows; where it becomes too large nothing of it is kept. Gives its room back when it goes."""

    def __init__(self, room: Room) -> None:
        """Find `room` for what is more than a little."""
        super().__init__()
        self._room = room
        self._taken = 0
        self.most = _READ
        self.is_dropped = False

    def belongs_to(self, message: str) -> None:
        """Be no larger than the data set of this message may be, by the name of its kind."""
        self.most = _LARGEST.get(message, _LARGEST_OTHER)

    def write(self, content: Any) -> int:
        """Append, as long as there is room."""
        if not self.is_dropped and not self._fits(self.tell() + len(content)):
            self.is_dropped = True
            self.seek(0)
            self.truncate()
            self._give_back()
        return len(content) if self.is_dropped else super().write(content)

    def _fits(self, size: int) -> bool:
        more = max(0, size - _ALWAYS) - self._taken
        if size > self.most or (more > 0 and not self._room.take(more)):
            return False
        self._taken += max(0, more)
        return True

    def _give_back(self) -> None:
        self._room.give_back(self._taken)
        self._taken = 0

    def __del__(self) -> None:
        """Give back what it had: whoever is last to read it decides when that is."""
        self._give_back()


def is_dropped(data_set: Any) -> bool:
    """Return whether a message had a data set that was not kept."""
    return isinstance(data_set, Collected) and data_set.is_dropped
