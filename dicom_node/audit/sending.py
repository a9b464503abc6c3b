"""The one thread that sends what waits: in order, in batches, until the collector has read them."""

from __future__ import annotations

import threading
import time

import structlog

from dicom_node.audit import syslog
from dicom_node.audit.outbox import Outbox
from dicom_node.config import AuditTable
from dicom_node.errors import NodeError, Unavailable
from dicom_node.tls import client_context

log = structlog.get_logger()

_POLL = 0.5  # seconds between two looks
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # after a failure; doubles
_SAY_AGAIN = 600.0  # seconds between two lines about a collector that is still away
_BATCH, _BATCH_BYTES = 500, 4 << 20
_LAST_WORDS = 3.0  # seconds that a stopping node gives its last messages


class Sending:
    """Empties an outbox."""

    def __init__(self, outbox: Outbox, table: AuditTable) -> None:
        """Send to the collector of `table`; raise SettingsError where TLS cannot be made of the table's files."""
        self._outbox = outbox
        self._table = table
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._pause = _FIRST_PAUSE
        self._said_at = 0.0
        client_context(table)

    def start(self) -> None:
        """Begin to send."""
        self._outbox.sweep()
        self._thread.start()

    def stop(self) -> None:
        """Send what there is, where that is soon done; the rest is sent in the next life."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_WORDS)

    def _run(self) -> None:
        pause = _POLL
        while not self._stop.wait(pause):
            pause = self._once()
        self._once()

    def _once(self) -> float:
        """Send what waits; return how long to wait before the next look."""
        try:
            self.empty()
        except NodeError as error:
            self._complain(error)
            pause, self._pause = self._pause, min(self._pause * 2, _LONGEST_PAUSE)
            return pause
        except Exception as error:  # a defect of ours must not end the thread
            log.exception("audit.defect", error=type(error).__name__)
            return _LONGEST_PAUSE
        if self._said_at:
            log.info("audit.sent", reason="the collector is back")
        self._pause, self._said_at = _FIRST_PAUSE, 0.0
        return _POLL

    def empty(self) -> None:
        """Send everything that waits; raise CollectorUnavailable or Unavailable where that fails."""
        waiting = self._outbox.waiting()
        while waiting:
            batch: list[bytes] = []
            size = 0
            for path in waiting[:_BATCH]:
                content = path.read_bytes()
                if batch and size + len(content) > _BATCH_BYTES:
                    break
                batch.append(content)
                size += len(content)
            self._send(batch)
            self._outbox.remove(waiting[: len(batch)])
            waiting = waiting[len(batch) :]

    def _send(self, batch: list[bytes]) -> None:
        context = client_context(self._table)  # anew, so that its files may change
        answered = syslog.send(batch, self._table.address, context, self._table.tls_name or self._table.address[0])
        if not answered:
            log.warning("audit.unanswered", reason="the collector does not end its connections (RFC 5425 4.4)")

    def _complain(self, error: NodeError) -> None:
        now = time.monotonic()
        if self._said_at and now < self._said_at + _SAY_AGAIN:
            return
        self._said_at = now
        try:
            waiting, size = len(self._outbox.waiting()), self._outbox.size()
        except Unavailable:
            waiting = size = -1
        log.error("audit.waiting", reason=str(error), messages=waiting, megabytes=round(size / 1e6, 1))
