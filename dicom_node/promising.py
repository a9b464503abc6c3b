"""The node's promise to keep what it holds: requests are answered by what the ledger and the disk say (PS3.4 Annex J).

A request is on record before it is answered, so its report outlives the node. The report goes out on the association
that asked, where that is still open a second later, else on a new one to the peer with the caller's AE title.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import structlog
from pydicom import Dataset

from dicom_node.collecting import is_dropped
from dicom_node.commitment import (
    REQUEST,
    STORAGE_COMMITMENT_INSTANCE,
    FailureReason,
    Malformed,
    Reference,
    Report,
    judge,
    read_request,
    report_on,
)
from dicom_node.config import Settings
from dicom_node.delivery import commit
from dicom_node.delivery.cstore import IMPLICIT
from dicom_node.errors import NodeError, PeerBusy, Refused, Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.commitments import Known, Pending
from dicom_node.recorder import Recorder
from dicom_node.services import Status
from dicom_node.spool import Spool

log = structlog.get_logger()

_AT_ONCE = 4  # reports on their way
_SHORTEST_PAUSE = 0.02
_LONGEST_PAUSE = 2.0  # seconds; a clock that was set back must not make a report wait for what it has lost
_LENT = 900.0  # seconds that a further process has for a report, before the node takes it for dead
_JITTER = random.Random()  # noqa: S311 - spreads retries; guards no secret


class Promising:
    """Answers requests for storage commitment, and sees to it that the answers are taken."""

    _lent = 0.0  # seconds after which a report is somebody else's

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        spool: Spool,
        recorder: Recorder,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Look instances up in `ledger`, once `recorder` has seen to it; read them again from `spool`."""
        self._settings = settings
        self._ledger = ledger
        self._spool = spool
        self._recorder = recorder
        self._clock = clock
        self._open: dict[int, tuple[Any, float]] = {}  # associations that asked, by request, and when to report
        self._under_way: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="commitment")
        self._thread = threading.Thread(target=self._run, name="commitment", daemon=True)

    def start(self) -> None:
        """Begin to report."""
        self._thread.start()

    def stop(self) -> None:
        """Begin nothing new, and wait for what is under way; the rest is reported in the next life."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- asked ----------------------------------------------------------------------------------------------

    def on_request(self, event: Any, calling_ae_title: str) -> tuple[int | Dataset, None]:
        """Answer an N-ACTION: 0x0000 says that the request is on record and its report will come."""
        request = event.request
        if request.ActionTypeID != REQUEST:
            return commit.failure(Status.NO_SUCH_ACTION, "The only action is 1, Request Storage Commitment"), None
        if str(request.RequestedSOPInstanceUID) != STORAGE_COMMITMENT_INSTANCE:
            return commit.failure(Status.NO_SUCH_SOP_INSTANCE, "Not the well-known SOP Instance"), None
        information = request.ActionInformation
        if is_dropped(information):
            return commit.failure(Status.RESOURCE_LIMITATION, "The action information is too large"), None
        try:
            asked = read_request(commit.encoded(information), is_implicit=event.context.transfer_syntax == IMPLICIT)
        except Malformed as error:
            return commit.failure(Status.INVALID_ARGUMENT_VALUE, str(error)), None
        now = self._clock()
        due = now + self._settings.commitment.same_association_after
        later = due + self._lent
        try:
            self._spool.require_room()  # a request is a row as long as itself
            number = self._ledger.commitments.asked(asked, calling_ae_title=calling_ae_title, not_before=later, now=now)
        except Unavailable as error:
            return commit.failure(Status.RESOURCE_LIMITATION, str(error)), None
        except Refused as error:
            return commit.failure(Status.INVALID_ARGUMENT_VALUE, str(error)), None
        with self._lock:
            self._open[number] = event.assoc, due
        self._wake.set()
        return Status.SUCCESS, None

    # -- reported -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()  # before the look: what is asked meanwhile is looked at next
            pause = _LONGEST_PAUSE
            try:
                self._begin()
                pause = self._pause()
            except Unavailable:
                pass  # the node says so elsewhere, and nothing is lost: the requests are on record
            except Exception as error:  # a defect of ours must not end the thread
                log.exception("commitment.defect", error=type(error).__name__)
            self._wake.wait(pause)

    def _pause(self) -> float:
        """Return how long nothing will be due, in seconds; what is under way says so when it has ended."""
        with self._lock:
            is_busy = bool(self._under_way)
        due = None if is_busy else self._next_due()
        return _LONGEST_PAUSE if due is None else min(max(due - self._clock(), _SHORTEST_PAUSE), _LONGEST_PAUSE)

    def _begin(self) -> None:
        """Begin to report on what is due and not under way."""
        for number in self._due(self._clock()):
            with self._lock:
                if number in self._under_way:
                    continue
                self._under_way.add(number)
            self._pool.submit(self._attend, number)

    def _due(self, now: float) -> list[int]:
        return self._ledger.commitments.due(now=now, limit=_AT_ONCE * 8)

    def _next_due(self) -> float | None:
        return self._ledger.commitments.next_due()

    def _attend(self, number: int) -> None:
        is_done = False
        try:
            pending = self._ledger.commitments.pending(number)
            if pending is not None:
                self._report(pending)
            else:  # somebody else has seen to it
                self._forget(number)
            is_done = True
        except Unavailable as error:
            log.warning("commitment.waiting", reason=str(error))
        except Exception as error:
            log.exception("commitment.defect", error=type(error).__name__)
        finally:
            with self._lock:
                self._under_way.discard(number)
            if is_done:  # else it is tried again, but not at once
                self._wake.set()

    def _forget(self, number: int) -> Any:
        """Return the association that made a request, if there is one, and forget it."""
        with self._lock:
            return self._open.pop(number, (None, 0.0))[0]

    def _report(self, pending: Pending) -> None:
        said = self.verdict(pending)
        try:
            how = self._send(pending, said)
        except NodeError as error:
            self._not_taken(pending, str(error))
            return
        self._ledger.commitments.answered(pending, said, now=self._clock(), how=how)
        log.info(
            "commitment.reported",
            calling_ae_title=pending.calling_ae_title,
            committed=len(said.committed),
            failed=len(said.failed),
            how=how,
        )

    def verdict(self, pending: Pending) -> Report:
        """Return what there is to say: every instance is looked up, read again and compared with its digest.

        What will be promised is on record before it is said, so that no retention deletes it.
        """
        if not self._recorder.flush():
            raise Unavailable("what has arrived is not recorded yet")
        references = pending.request.references
        known = self._ledger.commitments.known([reference.sop_instance_uid for reference in references])
        verdicts = {each: self._judge(each, known.get(each.sop_instance_uid)) for each in references}
        good = [each.sop_instance_uid for each, verdict in verdicts.items() if verdict is None]
        kept = self._ledger.commitments.promise(good, now=self._clock())
        gone = set(good) - kept
        return report_on(
            pending.request,
            [
                FailureReason.NO_SUCH_OBJECT_INSTANCE if each.sop_instance_uid in gone else verdict
                for each, verdict in verdicts.items()
            ],
        )

    def _judge(self, reference: Reference, known: Known | None) -> FailureReason | None:
        if known is None:
            return judge(reference, None, is_intact=False)
        return judge(reference, known.sop_class_uid, is_intact=self._spool.is_intact(known.path, known.digest))

    def _send(self, pending: Pending, said: Report) -> str:
        """Send the report; return on which association it was taken."""
        association = self._forget(pending.request_id)
        if association is not None and association.is_established:
            try:
                commit.report_on(association, said)
                return "on the association that asked"
            except PeerBusy as error:
                log.info("commitment.not_taken", reason=str(error))  # the other way is left
        return self._send_anew(pending, said)

    def _send_anew(self, pending: Pending, said: Report) -> str:
        peer = self._settings.peer_by_title(pending.calling_ae_title)
        if peer is None:
            raise PeerBusy(f'no [peer.NAME] has ae_title = "{pending.calling_ae_title}": its address is not known')
        commit.report(peer, said, ae_title=self._settings.node.ae_title, timing=self._settings.delivery)
        return "on a new association"

    def _not_taken(self, pending: Pending, reason: str) -> None:
        now, patience = self._clock(), self._settings.delivery.patience
        log.warning("commitment.not_reported", calling_ae_title=pending.calling_ae_title, reason=reason)
        if patience.is_over(pending.asked_at, now=now):
            self._ledger.commitments.given_up(pending, now=now, reason=reason)
            return
        later = patience.next_try(pending.attempts + 1, now=now, jitter=_JITTER)
        self._ledger.commitments.postponed(pending, now=now, not_before=later, reason=reason)


class PromisingOnBehalf(Promising):
    """The same in a further process that receives: it reports on the associations that asked it, where they last.

    Whatever else is to be reported, it leaves to the node.
    """

    _lent = _LENT

    def stop(self) -> None:
        """Leave to the node what is not reported."""
        super().stop()
        for number in list(self._open):
            with suppress(NodeError):  # else the node comes to it later
                if (pending := self._ledger.commitments.pending(number)) is not None:
                    self._not_taken(pending, "")

    def _due(self, now: float) -> list[int]:
        with self._lock:
            due = [number for number, (_, at) in self._open.items() if at <= now]
            for number in due:  # where that fails
                self._open[number] = self._open[number][0], now + _LONGEST_PAUSE
        return due

    def _next_due(self) -> float | None:
        with self._lock:
            return min((at for _, at in self._open.values()), default=None)

    def _report(self, pending: Pending) -> None:
        association, _ = self._open.get(pending.request_id, (None, 0.0))
        if association is not None and association.is_established:
            super()._report(pending)
        else:
            self._not_taken(pending, "")

    def _send_anew(self, pending: Pending, said: Report) -> str:
        raise PeerBusy("the association that asked has ended")

    def _not_taken(self, pending: Pending, reason: str) -> None:
        self._ledger.commitments.handed_on(pending, not_before=self._clock())
        self._forget(pending.request_id)
