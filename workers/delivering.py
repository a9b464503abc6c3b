"""A delivery job: the results of one inference to one peer, on one association."""

from __future__ import annotations

import hashlib
import time

import structlog

from dicom_node.config import Settings
from dicom_node.delivery.cstore import Parcel, deliver
from dicom_node.errors import Refused, ResultRefused, Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.jobs import Job, StoredResult
from dicom_node.lifecycle import Happening
from dicom_node.spool import Spool
from workers.lease import Lease

log = structlog.get_logger()


class Delivering:
    """Sends stored bytes; encodes nothing."""

    def __init__(self, settings: Settings, ledger: Ledger, spool: Spool) -> None:
        """Read results from `ledger` and `spool`, peers from `settings`."""
        self._settings = settings
        self._ledger = ledger
        self._spool = spool

    def __call__(self, job: Job, lease: Lease) -> None:
        """Deliver; raise Unavailable or Refused as the peer answers."""
        peer = self._settings.peer.get(job.peer or "")
        if peer is None:
            raise Refused(f"there is no [peer.{job.peer}] in the settings any more")
        parcels = [
            self._parcel(result)
            for result in self._ledger.jobs.results_of(job.parent_id or 0)
            if result.kind in peer.results
        ]
        statuses = (
            deliver(parcels, peer, ae_title=self._settings.node.ae_title, timing=self._settings.delivery)
            if parcels
            else []
        )
        self._ledger.jobs.ended(
            job,
            Happening.FINISHED,
            now=time.time(),
            detail=f"{len(statuses)} instances stored at {peer.ae_title}",
            statuses={uid: f"0x{status:04X}" for uid, status in statuses},
        )

    def _parcel(self, result: StoredResult) -> Parcel:
        """Return what to send; refuse bytes that are not those the ledger vouches for."""
        path = self._spool.absolute(result.path)
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise Unavailable(f"the result's file cannot be read: {error.strerror}") from error
        if digest != result.sha256:
            raise ResultRefused(f"{result.path} is not the file that was written (sha256)")
        return Parcel(result.sop_class_uid, result.sop_instance_uid, result.transfer_syntax_uid, path)
