"""One job from claim to record: claim, do, and say in one place how it ended."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Callable

import structlog
from structlog.contextvars import bound_contextvars

from dicom_node.config import Settings
from dicom_node.dispatch import Hints
from dicom_node.errors import NotApplicable, Refused, SettingsError, Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.jobs import Job, LostLease
from dicom_node.lifecycle import Happening, Kind
from dicom_node.spool import Spool
from workers.delivering import Delivering
from workers.inferring import Inferring
from workers.lease import Lease

log = structlog.get_logger()

_SHORTAGES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE})
_JITTER = random.Random()  # noqa: S311 - spreads retries; guards no secret


class Pipeline:
    """Runs jobs, one at a time."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        spool: Spool,
        *,
        worker: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Work as `worker`, the name in the ledger."""
        self._settings = settings
        self._ledger = ledger
        self._worker = worker
        self._clock = clock
        self._hints = Hints(settings, ledger)
        self._inferring = Inferring(settings, ledger, spool, self._hints)
        self._doers: dict[Kind, Callable[[Job, Lease], None]] = {
            Kind.INFER: self._inferring,
            Kind.DELIVER: Delivering(settings, ledger, spool),
        }

    def run(self, job_id: int) -> None:
        """Do the job if it is ours to do: a message that came twice, or late, finds it claimed and does nothing.

        A ledger that is away leaves the job as it is; its lease, or the next message, brings it back.
        """
        try:
            self._ledger.require_schema()
            self._run(job_id)
        except Unavailable as error:
            log.error("job.unrecorded", job=job_id, reason=str(error))
        except SettingsError as error:  # the node has been upgraded and this process has not: others can do the job
            log.error("worker.outdated", reason=str(error))
            os.kill(os.getpid(), signal.SIGTERM)

    def warm(self) -> None:
        """Get ready for the first inference, so that it waits for no import and no model."""
        self._inferring.warm()

    def close(self) -> None:
        """End what the jobs left running: models in processes of their own."""
        self._inferring.close()
        self._hints.close()

    def _run(self, job_id: int) -> None:
        lease_seconds = self._settings.jobs.lease
        job = self._ledger.jobs.claim(job_id, worker=self._worker, lease=lease_seconds, now=self._clock())
        if job is None:
            return
        with (
            bound_contextvars(job=job.job_id, kind=job.kind.value, model=job.model, attempt=job.attempts),
            Lease(self._ledger, job, seconds=lease_seconds) as lease,
        ):
            started = time.monotonic()
            outcome = self._attempt(job, lease)
            log.info("job.ended", outcome=outcome, seconds=round(time.monotonic() - started, 2))

    def _attempt(self, job: Job, lease: Lease) -> str:
        """Do it once, and record what came of it; every outcome of every job passes through here."""
        try:
            self._doers[job.kind](job, lease)
        except LostLease:
            return "lost: another worker has it"
        except NotApplicable as answer:
            return self._end(job, Happening.DECLINED, answer.reason, answer.detail)
        except Refused as error:
            return self._end(job, Happening.REFUSED, _reason(error), str(error))
        except Unavailable as error:
            return self._later(job, error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _SHORTAGES:
                return self._later(job, Unavailable(f"the machine has run short: {error.strerror}"))
            # a defect, of ours or of a model: its message may quote the images, its place in the code does not
            log.exception("job.defect", error=type(error).__name__)
            return self._once_more(job, error)
        return "done"

    def _later(self, job: Job, error: Unavailable) -> str:
        """Try again after a pause that doubles, for days: a disk may be full, or a PACS away, over a weekend."""
        patience = self._settings.delivery.patience
        now = self._clock()
        if patience.is_over(job.wanted_since, now=now):
            return self._end(job, Happening.EXHAUSTED, _reason(error), f"given up: {error}")
        later = patience.next_try(job.attempts, now=now, jitter=_JITTER)
        return self._end(job, Happening.POSTPONED, _reason(error), str(error), not_before=later)

    def _once_more(self, job: Job, error: Exception) -> str:
        detail = f"unexpected {type(error).__name__} in attempt {job.attempts}"
        earlier = sum(
            event["fields"].get("reason") == "defect" and event["at"] >= job.wanted_since
            for event in self._ledger.history.events_of_job(job.job_id)
        )
        if earlier + 1 >= self._settings.jobs.maximum_attempts:
            return self._end(job, Happening.EXHAUSTED, "defect", detail)
        return self._end(job, Happening.POSTPONED, "defect", detail, not_before=self._clock() + 1.0)

    def _end(self, job: Job, happening: Happening, reason: str, detail: str, *, not_before: float | None = None) -> str:
        try:
            self._ledger.jobs.ended(
                job, happening, now=self._clock(), reason=reason, detail=detail, not_before=not_before
            )
        except LostLease:
            return "lost: another worker has it"
        return f"{happening.value}: {reason}"


def _reason(error: Exception) -> str:
    """Return `peer_unreachable` for PeerUnreachable."""
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
