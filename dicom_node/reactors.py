"""The two threads of an incoming association, woken by what happens; pynetdicom's own look a thousand times a second.

Their work is pynetdicom's, method by method; only how they wait is ours. Two hundred idle associations would otherwise
keep a processor busy, and the senders that have something to say would wait for those that have not.
"""

from __future__ import annotations

import os
import queue
import select
import threading
from contextlib import suppress
from typing import Any

import structlog
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.dul import DULServiceProvider

log = structlog.get_logger()

_LONGEST_WAIT = 30.0  # seconds for what rings no bell; a thousand idle threads that wake often take all the time
_SHORTEST_WAIT = 0.25  # seconds; how late a timer may be noticed


class Bell:
    """Wakes a thread that polls: a descriptor beside its socket."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def ring(self) -> None:
        """Wake the thread, now or when it next waits."""
        with self._lock, suppress(BlockingIOError):
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def wait(self, beside: Any, seconds: float) -> None:
        """Wait until it is rung, or `beside` (a socket, or None) has something to read."""
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLIN)
        if beside is not None:
            waiting.register(beside, select.POLLIN)
        waiting.poll(seconds * 1000)
        with suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)

    def close(self) -> None:
        """Give the descriptor back."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


class Announced(queue.Queue[Any]):
    """A queue that sets an event whenever something is put into it."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self._event = event

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Put `item`, then say so."""
        super().put(item, block, timeout)
        self._event.set()


class Provider(DULServiceProvider):
    """The upper layer of one connection: reads what there is to read, sends what there is to send."""

    def __init__(self, association: Association) -> None:
        """Take the place of the association's own."""
        self._bell = Bell()
        self._is_killed = False
        self.sending = threading.Lock()  # held while the parts of one message are queued
        super().__init__(association)
        self.awake = threading.Event()  # something is there for the association's thread
        self.to_user_queue = Announced(self.awake)

    def send_pdu(self, primitive: Any) -> None:
        """Queue a primitive, and wake the thread that sends it."""
        super().send_pdu(primitive)
        self._bell.ring()

    def _process_recv_primitive(self) -> bool:
        with self.sending:
            return super()._process_recv_primitive()

    @property
    def _kill_thread(self) -> bool:
        """Return whether the thread is to end, or has ended; pynetdicom sets it in several places."""
        return self._is_killed

    @_kill_thread.setter
    def _kill_thread(self, value: bool) -> None:
        self._is_killed = value
        self._bell.ring()

    def wake(self) -> None:
        """Let the thread look again: there is room for another message."""
        self._bell.ring()

    def run_reactor(self) -> None:
        """Act on timers, primitives and PDUs, in pynetdicom's order, until the connection ends."""
        self._idle_timer.start()
        try:
            while not self._kill_thread:
                self.assoc._dul_ready.set()
                self._step()
        finally:
            self._is_killed = True
            self.awake.set()
            self._bell.close()

    def _step(self) -> None:
        if self.artim_timer.expired:
            self.event_queue.put("Evt18")
        if not self._process_recv_primitive() and self._is_transport_event():
            self._idle_timer.restart()
        try:
            event = self.event_queue.get(block=False)
        except queue.Empty:
            self._bell.wait(self._readable(), self._until_a_timer())
        else:
            self.state_machine.do_action(event)

    def _until_a_timer(self) -> float:
        """Return in how many seconds a timer has to be looked at; the association's thread acts on the idle one."""
        if self.idle_timer_expired():
            self.awake.set()
        timers = [self._idle_timer, self.artim_timer]
        running = [timer for timer in timers if timer._start_time is not None and timer._end_time is None]
        return max(_SHORTEST_WAIT, min([_LONGEST_WAIT, *(timer.remaining for timer in running if timer.timeout)]))

    def _readable(self) -> Any:
        """Return what to wait for beside the bell."""
        connection: Any = self.socket
        return connection.socket if connection is not None and connection.may_be_read else None


class Reactor(Association):
    """An association whose thread sleeps until its provider has something for it."""

    has_begun = False  # it was established, and may have ended since
    has_run = False  # its thread comes to its end; of one that is just beginning `is_alive` says that it is not either
    _is_established = False

    @property
    def is_established(self) -> bool:
        """Return whether messages may be exchanged; pynetdicom sets it in several places."""
        return self._is_established

    @is_established.setter
    def is_established(self, value: bool) -> None:
        self._is_established = value
        if value:
            self.has_begun = True
            provider: Any = self.dul
            provider.wake()

    def _bind_defaults(self) -> None:
        """Bind nothing, one by one: all associations of a server have the same handlers."""

    def run_reactor(self) -> None:
        """Negotiate, then serve; a request that pynetdicom chokes on is aborted, and leaves no thread behind."""
        try:
            super().run_reactor()
        except Exception as error:
            log.info("association.broken", error=type(error).__name__, address=self.requestor.address)
            self.abort()
        finally:
            self.has_run = True

    def _run_reactor(self) -> None:
        """Serve what comes; the order is pynetdicom's own."""
        provider: Any = self.dul
        while not self._kill:
            provider.awake.wait(_LONGEST_WAIT)
            provider.awake.clear()
            while not self._kill and self._serve_next():
                pass
            if self._kill or self._has_ended():
                return

    def _serve_next(self) -> bool:
        context_id, message = self.dimse.get_msg(block=False)
        if message and context_id is not None:
            self._serve_request(message, context_id)
        return bool(message)

    def _has_ended(self) -> bool:
        if self.is_established and self.acse.is_release_requested():
            # said before it is answered: the peer may close the connection at once, and that must not come first
            self.is_released, self.is_established = True, False
            evt.trigger(self, evt.EVT_RELEASED, {})
            self.acse.send_release(is_response=True)
        elif self.acse.is_aborted():
            self.dul.receive_pdu(wait=False)
            self.is_aborted, self.is_established = True, False
            evt.trigger(self, evt.EVT_ABORTED, {})
        elif not self.dul._kill_thread:
            if not self.dul.idle_timer_expired():
                return False
            self.abort()
        self.kill()
        return True
