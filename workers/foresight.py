"""A series that is read before its job is there: while the node still waits to be sure that it is complete."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dicom_node.ledger.arrivals import StoredInstance
from dicom_node.manifest import InputSlot
from workers.volume import Volume

_KEPT = 30.0  # seconds in which its job should come

Load = Callable[[Sequence[StoredInstance], InputSlot], Volume]


@dataclass(frozen=True, slots=True)
class _Input:
    """All that a volume depends on."""

    instances: tuple[StoredInstance, ...]
    slot: InputSlot


class Foresight:
    """Loads volumes, one of them perhaps before it is asked for; that one is held until then, or for a while."""

    def __init__(self, load: Load, *, kept: float = _KEPT) -> None:
        """Load by `load`; what was foreseen is let go after `kept` seconds."""
        self._load = load
        self._kept = kept
        self._changed = threading.Condition()
        self._input: _Input | None = None  # what was foreseen, or is being read
        self._volume: Volume | None = None
        self._forgets: threading.Timer | None = None

    def foresee(self, instances: Sequence[StoredInstance], slot: InputSlot) -> Volume | None:
        """Load what will probably be asked for; return None where something else is held. Raises what `load` does."""
        wanted = _Input(tuple(instances), slot)
        with self._changed:
            if self._input is not None and not set(self._input.instances) < set(instances):
                return None
            self._forget()
            self._input = wanted
        volume: Volume | None = None
        try:
            volume = self._load(instances, slot)
        finally:
            with self._changed:
                self._settle(volume)
        return volume

    def __call__(self, instances: Sequence[StoredInstance], slot: InputSlot) -> Volume:
        """Return a volume: that which was foreseen, where it is of the very same instances, else a new one.

        Raises what `load` does.
        """
        wanted, found = _Input(tuple(instances), slot), None
        with self._changed:
            self._changed.wait_for(lambda: self._input != wanted or self._volume is not None)
            if self._input == wanted:
                found = self._volume
                self._forget()
        return self._load(instances, slot) if found is None else found

    def _settle(self, volume: Volume | None) -> None:
        self._volume = volume
        if volume is None:
            self._input = None
        else:
            self._forgets = threading.Timer(self._kept, self._expire, [self._input])
            self._forgets.daemon = True
            self._forgets.start()
        self._changed.notify_all()

    def _expire(self, which: _Input) -> None:
        with self._changed:
            if self._input is which and self._volume is not None:
                self._forget()

    def _forget(self) -> None:
        self._input = self._volume = None
        if self._forgets is not None:
            self._forgets.cancel()
            self._forgets = None
