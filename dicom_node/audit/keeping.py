"""Makes durable what is reported, in order: messages in the outbox, lines in the ledger; later where not now."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import structlog

from dicom_node.audit import messages
from dicom_node.audit.messages import Indicator
from dicom_node.audit.outbox import Outbox
from dicom_node.errors import Refused, SpoolFull, Unavailable
from dicom_node.findings import Code
from dicom_node.ledger import Ledger
from dicom_node.ledger.journal import Note, Subject

log = structlog.get_logger()

_AT_ONCE = 100  # events in one transaction
_MOST = 10_000  # events that wait in memory for a disk or a ledger that is away


@dataclass(slots=True)
class Report:
    """An event that is not durable yet: its message, and its line."""

    name: str
    at: float
    subject: Subject
    message: bytes | None
    fields: dict[str, Any] | None


class Keeping:
    """What is not durable yet. Nothing of it raises."""

    def __init__(
        self, outbox: Outbox | None, ledger: Ledger, recording: Callable[[Code, str, Indicator], bytes]
    ) -> None:
        """Keep messages in `outbox`, lines in `ledger`; `recording` makes the message that some are missing."""
        self._outbox = outbox
        self._ledger = ledger
        self._recording = recording
        self._lock = threading.RLock()
        self._waiting: deque[Report] = deque()
        self._left_out = 0  # messages that a full outbox did not take; their lines are in the ledger

    def add(self, reports: Sequence[Report]) -> None:
        """Keep events: on return they are durable, unless the disk or the ledger is away; then they are tried again."""
        with self._lock:
            for report in reports:
                if len(self._waiting) < _MOST:
                    self._waiting.append(report)
                else:
                    log.error("audit.lost", name=report.name, reason="neither the disk nor the ledger takes it")
            self.keep()

    def keep(self) -> None:
        """Make durable what is not, as far as disk and ledger let it."""
        with self._lock:
            at_once = _AT_ONCE
            while self._waiting:
                first = list(islice(self._waiting, at_once))
                try:
                    self._keep(first)
                except Unavailable as error:
                    if len(self._waiting) == 1:
                        log.error("audit.not_kept", reason=str(error), name=first[0].name)
                    return
                except Refused as error:  # never: what comes after it must not wait
                    if len(first) > 1:
                        at_once = 1
                        continue
                    log.error("audit.not_kept", reason=str(error), name=first[0].name)
                for _ in first:
                    self._waiting.popleft()

    def _keep(self, some: Sequence[Report]) -> None:
        """Make some durable; a second attempt is about the rest."""
        for report in some:
            if report.message is not None:
                self._put(report.message)
                report.message = None
        lines = [report for report in some if report.fields is not None]
        self._ledger.history.note_all([Note(each.name, each.at, each.subject, each.fields or {}) for each in lines])
        for report in lines:
            report.fields = None

    def _put(self, message: bytes) -> None:
        """Put a message into the outbox; one that is full takes no more, and says so as its last message."""
        assert self._outbox is not None  # noqa: S101 - only then there is a message
        if self._left_out:
            words = f"{self._left_out} messages were left out while the spool was full; the ledger has their lines"
            if not self._outbox.is_roomy:
                self._left_out += 1
                return
            self._outbox.put(self._recording(messages.RECORDING_STARTED, words, Indicator.SUCCESS))
            log.info("audit.resumed", left_out=self._left_out)
            self._left_out = 0
        try:
            self._outbox.put(message)
        except SpoolFull as error:
            self._left_out = 1
            log.error("audit.full", reason=str(error))
            self._outbox.put(
                self._recording(messages.RECORDING_STOPPED, str(error), Indicator.MAJOR), beyond_limit=True
            )
