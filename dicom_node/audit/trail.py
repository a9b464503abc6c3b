"""What the edges report: each event a line of the ledger and, where there is a collector, a message in the outbox."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from dicom_node.audit import messages, syslog
from dicom_node.audit.keeping import Keeping, Report
from dicom_node.audit.messages import Action, Indicator, Message, Participant, Patient, Visit
from dicom_node.audit.outbox import Outbox
from dicom_node.audit.patients import patient_of, patient_of_study
from dicom_node.audit.repeats import Alarm, Repeats
from dicom_node.audit.sending import Sending
from dicom_node.config import Peer, Settings
from dicom_node.entities import AssociationIdentity
from dicom_node.errors import NodeError, Unavailable
from dicom_node.findings import Code
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import Interrupted
from dicom_node.ledger.journal import Subject
from dicom_node.services import Rejection

log = structlog.get_logger()

_NO_ALARM = frozenset({Rejection.LOCAL_LIMIT, Rejection.PEER_LIMIT, Rejection.STOPPING})


class Audit:
    """Where a process reports to. It never raises: what is reported has happened already."""

    def __init__(self, settings: Settings, ledger: Ledger, *, clock: Callable[[], float] = time.time) -> None:
        """Write to `ledger` and, where there is a collector, to the storage folder of `settings`."""
        self._ledger = ledger
        self._clock = clock
        self._table = settings.audit
        self._ae_title = settings.node.ae_title
        self._storage = settings.node.storage
        self._tls_certificate = settings.tls.certificate
        self._source = messages.Source(self._table.source or self._ae_title, self._table.site)
        self._machine = socket.gethostname()
        outbox = Outbox(self._storage / "audit", limit=self._table.spool_megabytes << 20)
        self._outbox = outbox if self._table.collector else None
        self._sending: Sending | None = None
        self._keeping = Keeping(self._outbox, ledger, self._recording)
        self._repeats = Repeats()
        self._lock = threading.Lock()  # on them

    # -- the node's own life ------------------------------------------------------------------------------

    def start(self, interrupted: Iterable[Interrupted] = ()) -> None:
        """Begin to send; say that the node starts, and what its earlier life was receiving when it died.

        Raises SettingsError where TLS cannot be made of the settings' files.
        """
        if self._outbox is not None:
            self._sending = Sending(self._outbox, self._table)
            self._sending.start()
        self.interrupted(interrupted)
        self._report(messages.activity(self._clock(), self._node(messages.APPLICATION, asks=True), is_start=True))

    def interrupted(self, parts: Iterable[Interrupted]) -> None:
        """Say what an earlier life was receiving when it died."""
        for part in parts:
            self._received_in_part(part)

    def tick(self) -> None:
        """Report the alarms that came again, and try again what could not be kept; call it every second or so."""
        self._report_repeats()
        self._keeping.keep()

    def stop(self) -> None:
        """Say that the node stops, and give what waits a moment to be sent."""
        self.finish()
        self._report(messages.activity(self._clock(), self._node(messages.APPLICATION, asks=True), is_start=False))
        if self._sending is not None:
            self._sending.stop()

    def finish(self) -> None:
        """Report the alarms that came again and are not reported yet."""
        self._report_repeats(everything=True)
        self._keeping.keep()

    # -- instances ----------------------------------------------------------------------------------------

    def received(self, visits: Iterable[Visit]) -> None:
        """Report what associations have brought, when they have ended: one message a study and outcome."""
        self._keeping.add([report for visit in visits for report in self._received(visit)])

    def _received(self, visit: Visit) -> Iterator[Report]:
        association = visit.association
        source = messages.peer(association.calling_ae_title, association.address, role=messages.SOURCE_ROLE, asks=True)
        ended = "" if visit.is_released else "the association was not released"
        for study_instance_uid, counts, action, indicator, words in visit.transfers:
            yield self._transferred(
                source,
                self._node(messages.DESTINATION),
                study_instance_uid,
                counts,
                self._patient_of_study(study_instance_uid),
                action=action,
                indicator=indicator,
                description=", ".join(filter(None, (words, ended))),
            )

    def _received_in_part(self, part: Interrupted) -> None:
        report = self._transferred(
            messages.peer(part.calling_ae_title, "", role=messages.SOURCE_ROLE, asks=True),
            self._node(messages.DESTINATION),
            part.study_instance_uid,
            {},
            self._patient_of_study(part.study_instance_uid),
            action=Action.CREATE,
            indicator=Indicator.SERIOUS,
            description=f"the node died while it received; {part.received} instances of the series are held",
        )
        self._keeping.add([report])

    def shipment(self, study_instance_uid: str, peer: Peer) -> Shipment:
        """Return what reports a delivery to a peer: its beginning, what was stored, and what was not."""
        return Shipment(self, study_instance_uid, peer)

    def shipped(
        self, shipment: Shipment, counts: Mapping[str, int], path: Path, indicator: Indicator, description: str
    ) -> None:
        """Report instances of a shipment, before it or after; `path` is a file of it."""
        peer = shipment.peer
        report = self._transferred(
            self._node(messages.SOURCE_ROLE, asks=True, ae_title=peer.calling_ae_title),
            messages.peer(peer.ae_title, peer.host, role=messages.DESTINATION),
            shipment.study_instance_uid,
            counts,
            patient_of(path) if self._wants_patients else None,
            action=Action.READ if shipment.has_begun else Action.EXECUTE,
            indicator=indicator,
            description=description,
            event=messages.INSTANCES_TRANSFERRED if shipment.has_begun else messages.BEGIN_TRANSFERRING,
        )
        self._keeping.add([report])

    def deleted(
        self, study_instance_uid: str, sop_classes: Mapping[str, int], *, reason: str, files: Path | None = None
    ) -> None:
        """Report that a study is deleted: instances by SOP Class UID, and why, in words without identity.

        Call it before the first file goes, with the folder that they lie in by now: then the patient can still be
        read, and a crash leaves no deletion without its message.
        """
        patient = self._patient_of_study(study_instance_uid, files)
        subject = messages.study(study_instance_uid, sop_classes)
        message = messages.deleted(self._clock(), self._node(asks=True), subject, patient, reason)
        self._report(message, study_instance_uid)

    def _transferred(
        self,
        source: Participant,
        destination: Participant,
        study_instance_uid: str,
        counts: Mapping[str, int],
        patient: Patient | None,
        *,
        action: Action,
        indicator: Indicator,
        description: str,
        event: Code = messages.INSTANCES_TRANSFERRED,
    ) -> Report:
        message = messages.transferred(
            event,
            self._clock(),
            source,
            destination,
            [messages.study(study_instance_uid, counts)],
            patient,
            action=action,
            indicator=indicator,
            description=description,
        )
        return self._reported(message, study_instance_uid, instances=sum(counts.values()))

    # -- who came -----------------------------------------------------------------------------------------

    def rejected(self, association: AssociationIdentity, rejection: Rejection, user: str) -> None:
        """Report an association that was not accepted; one too many is no alarm."""
        if rejection in _NO_ALARM:
            return
        is_user = rejection is Rejection.USER
        self._alarm(
            Alarm(
                f"association rejected: {rejection.value}",
                association.address,
                association.calling_ae_title,
                user if is_user else None,
                Indicator.MINOR if is_user else Indicator.SERIOUS,
            )
        )

    def handshake_failed(self, address: str, reason: str) -> None:
        """Report a TLS handshake that came to nothing."""
        self._alarm(Alarm(f"TLS handshake failed: {reason}", address))

    def admitted(self, association: AssociationIdentity, user: str) -> None:
        """Report a user that was named and is the right one (PS3.7 D.3.3.7)."""
        message = messages.login(self._clock(), user, association.address, self._node(), is_admitted=True)
        self._report(message, calling_ae_title=association.calling_ae_title)

    def certificate_reloaded(self) -> None:
        """Report that the node goes on with another certificate, key or authority."""
        self._report(
            messages.alert(
                self._clock(),
                messages.SECURITY_CONFIGURATION,
                self._node(asks=True),
                "the files of [tls] have changed and are in force",
                indicator=Indicator.SUCCESS,
                uri=self._tls_certificate.as_uri() if self._tls_certificate else "",
            )
        )

    def used(self, user: str) -> None:
        """Report that somebody, a user of this machine, reads the audit trail in the ledger."""
        reader = Participant(user, True, access_point=self._machine)
        self._report(messages.log_used(self._clock(), reader, f"urn:dicom-node:{self._source.source_id}:ledger"))

    def waiting(self) -> int | None:
        """Return how many messages the collector has not read yet; None where there is no collector."""
        return len(self._outbox.waiting()) if self._outbox else None

    def _alarm(self, alarm: Alarm) -> None:
        with self._lock:
            is_new = self._repeats.is_new(alarm, self._clock())
        if is_new:
            self._report_alarm(alarm, "")

    def _report_repeats(self, *, everything: bool = False) -> None:
        with self._lock:
            due = self._repeats.due(self._clock(), everything=everything)
        for alarm, number in due:
            self._report_alarm(alarm, f", {number} more within a minute")

    def _report_alarm(self, alarm: Alarm, more: str) -> None:
        now, words = self._clock(), alarm.words + more
        if alarm.user is not None:
            message = messages.login(
                now, alarm.user or "(none)", alarm.address, self._node(), is_admitted=False, description=words
            )
        else:
            message = messages.alert(
                now,
                messages.NODE_AUTHENTICATION,
                self._node(),
                words,
                indicator=alarm.indicator,
                performer=messages.peer(alarm.ae_title, alarm.address) if alarm.ae_title or alarm.address else None,
                node_id=alarm.address,
            )
        self._report(message, calling_ae_title=alarm.ae_title, address=alarm.address)

    # -- kept ---------------------------------------------------------------------------------------------

    @property
    def _wants_patients(self) -> bool:
        return self._outbox is not None and self._table.patient

    def _patient_of_study(self, study_instance_uid: str, files: Path | None = None) -> Patient | None:
        if not self._wants_patients:
            return None
        return patient_of_study(files or self._storage / "studies" / study_instance_uid)

    def _node(self, role: Code | None = None, *, asks: bool = False, ae_title: str | None = None) -> Participant:
        return messages.node(str(os.getpid()), ae_title or self._ae_title, self._machine, role=role, asks=asks)

    def _report(self, message: Message, study_instance_uid: str | None = None, **fields: Any) -> None:
        self._keeping.add([self._reported(message, study_instance_uid, **fields)])

    def _reported(self, message: Message, study_instance_uid: str | None = None, **fields: Any) -> Report:
        """Return what is to be kept of an event."""
        line = {
            "event": message.event.value,
            "type": " ".join(code.meaning for code in message.types),
            "action": message.action.value,
            "indicator": int(message.indicator),
            "from": _who(message, messages.SOURCE_ROLE),
            "to": _who(message, messages.DESTINATION),
            "why": message.description,
        }
        return Report(
            message.name,
            message.at,
            Subject(study_instance_uid),
            self._record(message) if self._outbox else None,
            {key: value for key, value in (line | fields).items() if value != ""},
        )

    def _record(self, message: Message) -> bytes:
        return syslog.record(
            messages.encode(message, self._source),
            at=message.at,
            hostname=self._machine,
            process=os.getpid(),
            is_warning=message.indicator is not Indicator.SUCCESS,
        )

    def _recording(self, kind: Code, words: str, indicator: Indicator) -> bytes:
        return self._record(messages.alert(self._clock(), kind, self._node(asks=True), words, indicator=indicator))


def _who(message: Message, role: Code) -> str:
    return " ".join(
        f"{each.ae_title}@{each.access_point}".rstrip("@") for each in message.participants if each.role == role
    )


@dataclass(slots=True)
class Shipment:
    """A delivery as the audit trail sees it: a `with` block around it reports how it ended."""

    audit: Audit
    study_instance_uid: str
    peer: Peer
    has_begun: bool = False
    _left: list[tuple[str, Path]] = field(default_factory=list)
    _stored: list[tuple[str, Path]] = field(default_factory=list)

    def begin(self, instances: Iterable[tuple[str, Path]]) -> None:
        """Report that the peer has accepted an association for instances: `(SOP Class UID, file)` of each."""
        self._left = list(instances)
        if self._left:
            self.audit.shipped(self, _counted(self._left), self._left[0][1], Indicator.SUCCESS, "")
        self.has_begun = True

    def stored(self, sop_class_uid: str, path: Path) -> None:
        """Note that the peer has stored one of them."""
        self._left.remove((sop_class_uid, path))
        self._stored.append((sop_class_uid, path))

    def __enter__(self) -> Shipment:
        """Begin with nothing sent."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Report what was stored, and what was not."""
        if not self.has_begun:
            return
        if self._stored:
            self.audit.shipped(self, _counted(self._stored), self._stored[0][1], Indicator.SUCCESS, "")
        if self._left:
            indicator = Indicator.MINOR if isinstance(error, Unavailable) else Indicator.SERIOUS
            words = str(error) if isinstance(error, NodeError) else "unexpected"
            self.audit.shipped(self, _counted(self._left), self._left[0][1], indicator, words)


def _counted(instances: Iterable[tuple[str, Path]]) -> Mapping[str, int]:
    return Counter(sop_class_uid for sop_class_uid, _ in instances)
