"""Keeps a job ours while we work on it."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import structlog

from dicom_node.errors import Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.moving import Job, LostLease

log = structlog.get_logger()

_RENEWALS = 4  # in the length of one lease


class Yielded(Exception):
    """The job gives way: it is put back into the queue."""


class Lease:
    """Renews the lease in a thread until it is let go, and carries the progress along."""

    def __init__(self, ledger: Ledger, job: Job, *, seconds: float) -> None:
        """Hold `job`, renewed for `seconds` at a time."""
        self._ledger = ledger
        self._job = job
        self._seconds = seconds
        self.progress = 0.0
        self._done = threading.Event()
        self._lost = False
        self._yields = False
        self._thread = threading.Thread(target=self._renew, name=f"lease of job {job.job_id}", daemon=True)

    def report(self, progress: float, *, may_yield: bool = False) -> None:
        """Note the finished fraction, 0..1.

        Raises:
            LostLease: the job was taken from us meanwhile, or cancelled.
            Yielded: it was asked to give way, and this is a moment when it may.
        """
        self.progress = progress
        if self._lost:
            raise LostLease
        if self._yields and may_yield:
            raise Yielded

    def give_way(self) -> None:
        """Ask, from another thread, that the work on the job ends for now, at the next moment when it may."""
        self._yields = True

    def hold(self) -> None:
        """Start renewing."""
        self._thread.start()

    def let_go(self) -> None:
        """Stop renewing."""
        self._done.set()
        self._thread.join()

    def __enter__(self) -> Lease:
        """Hold it for the length of a `with` block."""
        self.hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let it go."""
        self.let_go()

    def _renew(self) -> None:
        while not self._done.wait(min(self._seconds / _RENEWALS, 2.0)):
            try:
                self._ledger.jobs.renew(self._job, lease=self._seconds, progress=self.progress, now=time.time())
            except LostLease:
                self._lost = not self._done.is_set()
                return
            except Unavailable as error:
                log.warning("lease.not_renewed", reason=str(error))
