"""A delivery job: the results of one inference to one peer, on one association; committed where the peer commits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from pydicom.uid import generate_uid

from dicom_node.audit import Audit
from dicom_node.commitment import Reference
from dicom_node.config import Peer, Settings
from dicom_node.delivery.commit import Question, ask
from dicom_node.delivery.cstore import Answers, Parcel, deliver
from dicom_node.errors import PeerRefused, Refused, ResultRefused, Unavailable
from dicom_node.forms import Choice, Offer, choose
from dicom_node.ledger import Ledger
from dicom_node.ledger.commitments import Answer, Promise
from dicom_node.ledger.moving import Job, StoredResult
from dicom_node.lifecycle import Happening
from dicom_node.services import RESULT_SOP_CLASSES
from dicom_node.spool import Spool
from workers.stopwatch import Stopwatch

log = structlog.get_logger()


class Delivering:
    """Sends stored bytes; encodes nothing."""

    def __init__(self, settings: Settings, ledger: Ledger, spool: Spool) -> None:
        """Read results from `ledger` and `spool`, peers from `settings`."""
        self._settings = settings
        self._ledger = ledger
        self._spool = spool
        self._audit = Audit(settings, ledger)

    def __call__(self, job: Job, watch: Stopwatch) -> None:
        """Deliver; raise Unavailable or Refused as the peer answers."""
        peer = self._settings.peer.get(job.peer or "")
        if peer is None:
            raise Refused(f"there is no [peer.{job.peer}] in the settings any more")
        wanted = [
            result
            for result in self._ledger.jobs.results_of(job.parent_id or 0)
            if result.kind in peer.results
            and (result.form is None or result.form in {form.key for form in peer.wish.forms})
        ]
        if peer.commitment and (promises := self._ledger.commitments.promises(job.job_id)):
            self._once_more(job, peer, wanted, promises, watch)
            return
        with watch.stage("read"):
            parcels = [self._parcel(result) for result in wanted]
        selection = _Selection(job.peer or "", peer, wanted, parcels, self._ledger)
        asking = self._question(job, peer, ()) if peer.commitment else None
        statuses = self._deliver(job, peer, selection.parcels, watch, asking, choose=selection.choose) if wanted else []
        fields: dict[str, Any] = {
            "detail": f"{len(statuses)} instances stored at {peer.ae_title}",
            "statuses": {uid: f"0x{status:04X}" for uid, status in statuses},
            "replaced": list(selection.choice.replaced),
            "seconds": watch.seconds,
        }
        if asking and statuses:
            self._hand_over(job, **fields)
        else:
            self._ledger.jobs.ended(job, Happening.FINISHED, now=time.time(), **fields)

    def _once_more(
        self, job: Job, peer: Peer, results: Sequence[StoredResult], promises: Sequence[Promise], watch: Stopwatch
    ) -> None:
        """Send again what the peer does not commit, and ask again about everything that it has not committed."""
        by_uid = {result.sop_instance_uid: result for result in results}
        if missing := [promise for promise in promises if promise.sop_instance_uid not in by_uid]:
            raise Refused(f"{len(missing)} of the results are not wanted any more by [peer.{job.peer}].results")
        again = [by_uid[promise.sop_instance_uid] for promise in promises if promise.is_to_be_sent]
        held = tuple(
            Reference(by_uid[promise.sop_instance_uid].sop_class_uid, promise.sop_instance_uid)
            for promise in promises
            if promise.answer is not Answer.COMMITTED and not promise.is_to_be_sent
        )
        question = self._question(job, peer, held)
        if again:
            self._deliver(job, peer, [self._parcel(result) for result in again], watch, question)
        elif held:
            ask(question, ae_title=self._settings.node.ae_title, timing=self._settings.delivery)
        self._hand_over(job, f"{len(again)} instances sent again, {len(again) + len(held)} asked about again")

    def _deliver(
        self,
        job: Job,
        peer: Peer,
        parcels: Sequence[Parcel],
        watch: Stopwatch,
        asking: Question | None,
        choose: Callable[[Answers], Sequence[Parcel]] | None = None,
    ) -> list[tuple[str, int]]:
        node, timing = self._settings.node, self._settings.delivery
        with self._audit.shipment(job.study_instance_uid, peer) as shipment:

            def begin(answers: Answers) -> Sequence[Parcel]:
                chosen = choose(answers) if choose else parcels
                shipment.begin((parcel.sop_class_uid, parcel.path) for parcel in chosen)
                return chosen

            watch.begin("associate")
            statuses = deliver(
                parcels,
                peer,
                ae_title=node.ae_title,
                timing=timing,
                choose=begin,
                sent=lambda parcel, _status: shipment.stored(parcel.sop_class_uid, parcel.path),
                asking=asking,
                begins=watch.begin,
            )
            watch.end()
        return statuses

    def _question(self, job: Job, peer: Peer, held_already: tuple[Reference, ...]) -> Question:
        """Return what asks the peer for commitment; what is asked stands in the ledger before it is asked."""
        commitments, patience = self._ledger.commitments, self._settings.delivery.patience

        def before(references: Sequence[Reference]) -> str:
            transaction_uid = str(generate_uid(prefix=None))
            uids = [reference.sop_instance_uid for reference in references]
            commitments.ask(job, transaction_uid, uids, now=time.time())
            return transaction_uid

        return Question(
            peer,
            held_already,
            before,
            reported=lambda report: commitments.reported(report, now=time.time(), patience=patience),
            is_answered=lambda: all(each.answer is not Answer.ASKED for each in commitments.promises(job.job_id)),
            wait=self._settings.commitment.report_wait,
        )

    def _hand_over(self, job: Job, detail: str, **fields: Any) -> None:
        now = time.time()
        self._ledger.commitments.handed_over(
            job,
            now=now,
            ask_again_at=now + self._settings.commitment.ask_again_after,
            patience=self._settings.delivery.patience,
            detail=detail,
            **fields,
        )

    def _parcel(self, result: StoredResult) -> Parcel:
        """Return what to send; refuse bytes that are not those the ledger vouches for."""
        path = self._spool.absolute(result.path)
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise Unavailable(f"the result's file cannot be read: {error.strerror}") from error
        if digest != result.sha256:
            raise ResultRefused(f"{result.path} is not the file that was written (sha256)")
        return Parcel(result.sop_class_uid, result.sop_instance_uid, result.transfer_syntax_uid, path)


@dataclass(slots=True)
class _Selection:
    """What of the results goes to a peer, once it has said what it takes; its answers are remembered."""

    name: str
    peer: Peer
    results: Sequence[StoredResult]
    parcels: Sequence[Parcel]
    ledger: Ledger
    choice: Choice = field(default_factory=lambda: Choice(()))

    def choose(self, answers: Answers) -> list[Parcel]:
        """Return the parcels to send; raise PeerRefused where a kind would be lost, before anything is sent."""
        self.ledger.peers.answered(self.peer.address, answers, now=time.time())
        accepted = {sop_class_uid for (sop_class_uid, _), taken in answers.items() if taken}
        offers = [Offer(result.kind, result.form, result.sop_class_uid) for result in self.results]
        self.choice = choose(self.peer.wish, offers, accepted)
        if self.choice.lost:
            lost = self.choice.lost
            classes = sorted({RESULT_SOP_CLASSES[offer.sop_class_uid] for offer in offers if offer.kind in lost})
            raise PeerRefused(
                f"{self.peer.ae_title} does not take {', '.join(classes) or ', '.join(lost)}, and nothing else in "
                f"[peer.{self.name}].results says the same; `dicom-node peers probe {self.name}` shows what it takes"
            )
        return [self.parcels[number] for number in self.choice.chosen]
