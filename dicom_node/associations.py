"""The associations that are open: who is let in, what each has sent, and the end of each, said once."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dicom_node.entities import AssociationIdentity
from dicom_node.places import Places
from dicom_node.recorder import Ended
from dicom_node.services import Admission, Caller, Rejection


@dataclass(slots=True)
class Opened:
    """An association that is open, and what it has sent so far."""

    identity: AssociationIdentity
    association: Any
    started: float
    released: bool = False
    busy: bool = False  # something of it is being made durable
    gone: bool = False  # it has ended; whoever is last, what it does or its end, closes the books
    stored: int = 0
    refused: int = 0
    bytes: int = 0
    latest: int = 0  # bytes of the data set that was stored last: the next may have as many


class Associations:
    """The books on every open association."""

    def __init__(self, admission: Admission, on_end: Callable[[Ended], None], places: Places | None = None) -> None:
        """Admit by `admission`, as long as there are `places`; `on_end` is told of each that has ended."""
        self._admission = admission
        self._on_end = on_end
        self._places = places or Places()
        self._open: dict[Any, Opened] = {}
        self._lock = threading.Lock()
        self._at_work = 0
        self.is_stopping = False

    def admit(self, association: Any, caller: Caller) -> Rejection | None:
        """Judge and, in the same breath, count: two requests at once cannot both take the last place."""
        identity = AssociationIdentity(
            uuid.uuid4().hex, caller.calling_ae_title, caller.called_ae_title, caller.address
        )
        title, places = identity.calling_ae_title, self._places
        with self._lock, places:
            if self.is_stopping:
                return Rejection.STOPPING
            rejection = self._admission.judge(caller, open_in_all=places.number(), open_of_peer=places.number(title))
            if rejection is None:
                self._open[association] = Opened(identity, association, time.monotonic())
                places.take(title)
            return rejection

    def get(self, association: Any) -> Opened | None:
        """Return the books on an association; None where it has ended."""
        return self._open.get(association)

    def listed(self) -> list[Opened]:
        """Return every open association."""
        with self._lock:
            return list(self._open.values())

    @property
    def at_work(self) -> int:
        """Return how many instances are being made durable."""
        return self._at_work

    def released(self, association: Any) -> None:
        """Note that an association ends as it should."""
        opened = self.get(association)
        if opened is not None:
            opened.released = True
        self.ended(association)

    def ended(self, association: Any) -> None:
        """Close the books on an association; called once or more often, by whichever event comes first."""
        with self._lock:
            opened = self._open.pop(association, None)
            if opened is None:
                return
            self._places.give_back(opened.identity.calling_ae_title)
            opened.gone = True
            if opened.busy:  # an instance of it may still be recorded, and with it a hold on the series
                return
        self._close(opened)

    def begin_work(self, opened: Opened) -> None:
        """Count an instance as being made durable, and its association as busy, until `end_work`."""
        with self._lock:
            self._at_work += 1
            opened.busy = True

    def end_work(self, opened: Opened) -> None:
        """Count it no more."""
        with self._lock:
            self._at_work -= 1
            opened.busy = False
            is_last = opened.gone
        if is_last:
            self._close(opened)

    def _close(self, opened: Opened) -> None:
        if opened.stored or opened.refused:
            seconds = time.monotonic() - opened.started
            self._on_end(Ended(opened.identity, opened.released, time.time(), seconds, opened.bytes, opened.refused))
