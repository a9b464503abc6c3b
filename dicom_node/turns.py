"""Two threads of an association take turns: pynetdicom's own, and whoever expects an answer on it."""

from __future__ import annotations

import threading
from typing import Any

from pynetdicom.association import Association


class Checkpoint(threading.Event):
    """Where an association's thread waits while another thread expects an answer on the same association.

    With pynetdicom's own it now and then goes on although it has just said that it waits, and takes the answer for a
    request: whoever expects it then waits in vain, on a busy machine every few thousand messages.
    """

    def __init__(self, association: Association) -> None:
        super().__init__()
        self._association = association

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set; only who finds it set after having said so goes on."""
        while super().wait(timeout):
            self._association._is_paused = False
            if self.is_set():
                return True
            self._association._is_paused = True
        return False

    def set(self) -> None:
        """Let it go on; where the peer has aborted nothing more is sent, even before the thread has had its turn."""
        acse: Any = getattr(self._association, "acse", None)  # not yet, while the association is being made
        if acse is not None and acse.is_aborted():
            self._association.is_established = False
        super().set()


def _say_paused(association: Association, is_paused: bool) -> None:
    """Take down whether an association's own thread waits; of the other threads only who ends it has a say.

    pynetdicom serves an N-EVENT-REPORT in a thread of its own, which says at its end that nobody waits any more, though
    the association's thread may have begun to: whoever then sends, or releases, waits for it for ever. And it says at
    its beginning that somebody waits, though nobody does.
    """
    said = association.__dict__
    if threading.current_thread() is association or "paused" not in said or association._kill:
        said["paused"] = is_paused


def amend() -> None:
    """Have every association of this process take turns so: those that the node requests are pynetdicom's own."""
    Association._reactor_checkpoint = property(  # type: ignore[assignment]
        lambda self: self.__dict__["checkpoint"],
        lambda self, _event: self.__dict__.update(checkpoint=Checkpoint(self)),
    )
    Association._is_paused = property(lambda self: self.__dict__["paused"], _say_paused)  # type: ignore[assignment]
