"""Keeps a job ours while we work on it."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import structlog

from dicom_node.errors import Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.jobs import Job, LostLease

log = structlog.get_logger()

_RENEWALS = 4  # in the length of one lease


class Lease:
    """Renews the lease in a thread for the length of a `with` block, and carries the progress along."""

    def __init__(self, ledger: Ledger, job: Job, *, seconds: float) -> None:
        """Hold `job`, renewed for `seconds` at a time."""
        self._ledger = ledger
        self._job = job
        self._seconds = seconds
        self._progress = 0.0
        self._done = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._renew, name=f"lease of job {job.job_id}", daemon=True)

    def report(self, progress: float) -> None:
        """Note the finished fraction, 0..1; raise LostLease where the job was taken from us meanwhile."""
        self._progress = progress
        if self._lost:
            raise LostLease

    def __enter__(self) -> Lease:
        """Start renewing."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing."""
        self._done.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._done.wait(min(self._seconds / _RENEWALS, 2.0)):
            try:
                self._ledger.jobs.renew(self._job, lease=self._seconds, progress=self._progress, now=time.time())
            except LostLease:
                self._lost = not self._done.is_set()
                return
            except Unavailable as error:
                log.warning("lease.not_renewed", reason=str(error))
