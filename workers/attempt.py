"""One attempt at a job, from claim to record; however it ends, it is said here, in one place."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from structlog.contextvars import bound_contextvars

from dicom_node.config import Settings
from dicom_node.errors import NotApplicable, PeerUnreachable, Refused, Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.moving import Job, LostLease
from dicom_node.lifecycle import Happening
from workers.lease import Lease, Yielded
from workers.stopwatch import Stopwatch

log = structlog.get_logger()

Made = TypeVar("Made")

_SHORTAGES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE})
_JITTER = random.Random()  # noqa: S311 - spreads retries; guards no secret
_LOST = "lost: another worker has it, or it was cancelled"


class Attempt:
    """A job that is ours, done step by step, in whichever thread; `is_over` says that its end is on record."""

    def __init__(self, job: Job, *, settings: Settings, ledger: Ledger, clock: Callable[[], float]) -> None:
        """Hold the lease of `job`, which was just claimed."""
        self.job = job
        self.lease = Lease(ledger, job, seconds=settings.jobs.lease)
        self.watch = Stopwatch()
        self.is_over = False
        self._settings = settings
        self._ledger = ledger
        self._clock = clock
        self._started = time.monotonic()
        self.lease.hold()

    def step(self, do: Callable[[], Made]) -> Made | None:
        """Return what one step makes; None where the job ends in it, which is on record then."""
        job = self.job
        with bound_contextvars(job=job.job_id, kind=job.kind.value, model=job.model, attempt=job.attempts):
            try:
                return self._tried(do)
            except Unavailable as error:  # its lease, or the next message, brings it back
                log.error("job.unrecorded", reason=str(error))
                self._over("unrecorded")
        return None

    def last_step(self, do: Callable[[], object]) -> None:
        """Do what finishes the job and records that by itself."""

        def whole() -> None:
            do()
            self._over("done")

        self.step(whole)

    def put_back(self, reason: str) -> None:
        """Give the job back to the queue before its model has begun; no attempt is counted."""
        self.step(lambda: self._yield(reason, interrupted=False))

    def _tried(self, do: Callable[[], Made]) -> Made | None:
        try:
            return do()
        except LostLease:
            self._over(_LOST)
        except Yielded:
            self._yield("more_urgent", interrupted=True)
        except NotApplicable as answer:
            self._end(Happening.DECLINED, answer.reason, answer.detail)
        except Refused as error:
            self._end(Happening.REFUSED, _reason(error), str(error))
        except Unavailable as error:
            self._later(error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _SHORTAGES:
                self._later(Unavailable(f"the machine has run short: {error.strerror}"))
                return None
            # a defect, of ours or of a model: its message may quote the images, its place in the code does not
            log.exception("job.defect", error=type(error).__name__)
            self._once_more(error)
        return None

    def _later(self, error: Unavailable) -> None:
        """Try again after a pause that doubles, for days: a disk may be full, or a PACS away, over a weekend."""
        job, patience, now = self.job, self._settings.delivery.patience, self._clock()
        if patience.is_over(job.wanted_since, now=now):
            self._end(Happening.EXHAUSTED, _reason(error), f"given up: {error}")
        else:
            tries = self._ledger.jobs.tries(job) if isinstance(error, PeerUnreachable) else job.attempts
            later = patience.next_try(tries, now=now, jitter=_JITTER)
            self._end(Happening.POSTPONED, _reason(error), str(error), not_before=later)

    def _once_more(self, error: Exception) -> None:
        detail = f"unexpected {type(error).__name__} in attempt {self.job.attempts}"
        earlier = sum(
            event["fields"].get("reason") == "defect" and event["at"] >= self.job.wanted_since
            for event in self._ledger.history.events_of_job(self.job.job_id)
        )
        if earlier + 1 >= self._settings.jobs.maximum_attempts:
            self._end(Happening.EXHAUSTED, "defect", detail)
        else:
            self._end(Happening.POSTPONED, "defect", detail, not_before=self._clock() + 1.0)

    def _yield(self, reason: str, *, interrupted: bool) -> None:
        try:
            self._ledger.jobs.yielded(self.job, reason=reason, now=self._clock(), interrupted=interrupted)
        except LostLease:
            self._over(_LOST)
        else:
            self._over(f"{Happening.YIELDED.value}: {reason}")

    def _end(self, happening: Happening, reason: str, detail: str, *, not_before: float | None = None) -> None:
        try:
            self._ledger.jobs.ended(
                self.job, happening, now=self._clock(), reason=reason, detail=detail, not_before=not_before
            )
        except LostLease:
            self._over(_LOST)
        else:
            self._over(f"{happening.value}: {reason}")

    def _over(self, outcome: str) -> None:
        self.is_over = True
        self.lease.let_go()
        log.info("job.ended", outcome=outcome, seconds=round(time.monotonic() - self._started, 2))


def _reason(error: Exception) -> str:
    """Return `peer_unreachable` for PeerUnreachable."""
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
