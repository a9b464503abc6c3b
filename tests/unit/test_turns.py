"""No answer is taken by the wrong thread, however unlucky the moment."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from pynetdicom import AE
from pynetdicom.association import Association

from dicom_node.turns import Checkpoint, amend


def test_a_thread_that_is_told_to_wait_the_moment_it_goes_on_waits(monkeypatch):
    association: Any = SimpleNamespace(_is_paused=True)
    checkpoint = Checkpoint(association)
    checkpoint.set()
    original, hasty = threading.Event.wait, [True]

    def wait(event, timeout=None):
        found = original(event, timeout)
        if event is checkpoint and hasty:
            hasty.clear()
            checkpoint.clear()  # another thread, which has read that this one waits, and sends its request now
        return found

    monkeypatch.setattr(threading.Event, "wait", wait)
    gone_on = threading.Event()
    thread = threading.Thread(target=lambda: (checkpoint.wait(), gone_on.set()), daemon=True)
    thread.start()

    assert not gone_on.wait(0.3)
    assert association._is_paused

    checkpoint.set()
    assert gone_on.wait(10)
    assert not association._is_paused
    thread.join()


def test_every_association_has_such_a_checkpoint_those_that_the_node_asks_for_too():
    amend()
    first, second = (Association(AE(), "requestor") for _ in range(2))

    assert isinstance(first._reactor_checkpoint, Checkpoint)
    assert first._reactor_checkpoint is not second._reactor_checkpoint
    assert first._reactor_checkpoint.is_set()


def test_only_its_own_thread_and_who_ends_it_say_whether_an_association_waits():
    """pynetdicom serves a report in another thread, which says at its end that nobody waits."""
    amend()
    waits, goes_on, has_gone_on = threading.Event(), threading.Event(), threading.Event()

    class Serving(Association):
        def run_reactor(self) -> None:
            self._is_paused = True
            waits.set()
            self._reactor_checkpoint.wait()
            has_gone_on.set()
            goes_on.wait(10)

    association = Serving(AE(), "requestor")
    assert not association._is_paused
    association._reactor_checkpoint.clear()
    association.start()
    assert waits.wait(10)

    association._is_paused = False  # the report has been served
    assert association._is_paused

    association._reactor_checkpoint.set()
    assert has_gone_on.wait(10)
    association._is_paused = True  # another report is being served
    assert not association._is_paused

    association.kill()
    assert association._is_paused
    goes_on.set()
    association.join(10)
