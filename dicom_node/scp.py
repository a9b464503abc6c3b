"""The listening side: Verification, Storage, Storage Commitment. Every handler hands over at once; nothing decides."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import AE, _config, evt

from dicom_node.audit import Audit, Transfers
from dicom_node.commitment import STORAGE_COMMITMENT, Report
from dicom_node.config import Settings
from dicom_node.delivery.commit import answer_report
from dicom_node.entities import AssociationIdentity
from dicom_node.errors import InvalidInstance, SettingsError, Unavailable
from dicom_node.intake import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, Intake, Outcome
from dicom_node.ledger import Ledger
from dicom_node.promising import Promising
from dicom_node.services import (
    A_ASSOCIATE_RJ,
    RESULT_TRANSFER_SYNTAXES,
    STORAGE_SOP_CLASSES,
    TRANSFER_SYNTAXES,
    VERIFICATION,
    Caller,
    Rejection,
    Status,
)
from dicom_node.tls import Reloading, fingerprint
from dicom_node.wire import GuardedServer, Limits, TooLarge

log = structlog.get_logger()

_UNASSOCIATED = 100  # connections beyond the limit of associations, so that who comes too much is told
_MEGABYTE = 1024 * 1024
_NAMED = (1, 2)  # types of user identity: a user name, with or without a passcode (PS3.7 D.3.3.7)
_ERROR_COMMENT = 64  # characters in a VR of LO


@dataclass(slots=True)
class _Open:
    """An association that is open, and what it has sent so far."""

    identity: AssociationIdentity
    association: Any
    started: float
    released: bool = False
    touched: bool = False
    busy: bool = False  # a handler is at work on it
    gone: bool = False  # it has ended; whoever is last, its handler or its end, closes the books
    outcomes: dict[str, int] = field(default_factory=dict)
    transfers: Transfers = field(default_factory=Transfers)
    bytes: int = 0


class Scp:
    """The node's own application entity."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        intake: Intake,
        promising: Promising | None = None,
        audit: Audit | None = None,
    ) -> None:
        """Prepare to listen; `start` does. Without `promising` nothing is promised to those who ask."""
        self._promising = promising
        self._audit = audit or Audit(settings, ledger)
        self._settings = settings
        self._ledger = ledger
        self._intake = intake
        self._admission = settings.admission
        self._open: dict[Any, _Open] = {}
        self._unclosed: list[_Open] = []  # ended while the ledger was away
        self._lock = threading.Lock()
        self._in_flight = 0
        self._stopping = False
        self._servers: list[Any] = []
        self._tls: Reloading | None = None

    # -- life -----------------------------------------------------------------------------------------------

    def start(self) -> int:
        """Listen; return the port."""
        receive, node = self._settings.receive, self._settings.node
        _config.UNRESTRICTED_STORAGE_SERVICE = receive.keep_private_sop_classes
        entity = AE(ae_title=node.ae_title)
        entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        entity.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        entity.maximum_pdu_size = receive.maximum_pdu_length
        entity.network_timeout = receive.network_timeout
        entity.acse_timeout = receive.association_timeout
        entity.maximum_associations = receive.maximum_associations + _UNASSOCIATED  # ours is asked first, and says why
        entity.add_supported_context(VERIFICATION)
        for sop_class in STORAGE_SOP_CLASSES:
            entity.add_supported_context(sop_class.uid, list(TRANSFER_SYNTAXES))
        # both roles: a modality that asks is its SCU, a PACS that reports is its SCP
        entity.add_supported_context(STORAGE_COMMITMENT, list(RESULT_TRANSFER_SYNTAXES), scu_role=True, scp_role=True)
        if receive.plain:
            self._listen(entity, node.port)
        if self._settings.tls.is_on:
            self._tls = Reloading(self._settings.tls)
            self._listen(entity, self._settings.tls.port, self._tls)
        if not self._servers:
            raise SettingsError("receive.plain = false without [tls] certificate: the node would not listen at all")
        return self.ports[0]

    @property
    def ports(self) -> list[int]:
        """Return where it listens: plain first, then with TLS."""
        return [int(server.socket.getsockname()[1]) for server in self._servers]

    @property
    def open_associations(self) -> int:
        """Return how many associations are open."""
        return len(self._open)

    def _listen(self, entity: AE, port: int, tls: Reloading | None = None) -> None:
        server: Any = entity.make_server(
            (self._settings.node.host, port),
            server_class=GuardedServer,
            evt_handlers=self._handlers(),
            limits=self._limits(),
        )
        if tls is not None:
            server.tls = lambda: tls.context
            server.on_failed_handshake = self._on_failed_handshake
        entity._servers.append(server)
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, name=f"listener {port}", daemon=True).start()

    def _on_failed_handshake(self, address: str, reason: str) -> None:
        log.warning("tls.refused", address=address, reason=reason)
        self._note("tls.refused", address=address, reason=reason)
        self._audit.handshake_failed(address, reason)

    def _limits(self) -> Limits:
        receive = self._settings.receive
        return Limits(
            maximum_pdu_length=receive.maximum_pdu_length,
            maximum_message=receive.maximum_instance_megabytes * _MEGABYTE,
            association_timeout=receive.association_timeout,
            network_timeout=receive.network_timeout,
            maximum_connections=receive.maximum_associations + _UNASSOCIATED,
            maximum_connections_per_address=receive.maximum_connections_per_address,
        )

    def stop(self, *, grace: float = 10.0) -> None:
        """Stop listening, finish the instances in flight, then end what is still open."""
        self._stopping = True
        if not self._servers:
            return
        deadline = time.monotonic() + grace
        while self._in_flight and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # the response to the last instance leaves after its handler has returned
        for opened in self._listed():
            opened.association.abort(block=False)
        for server in self._servers:
            server.shutdown()
        self._servers = []
        self.reap(everything=True)

    def reap(self, *, everything: bool = False) -> None:
        """End the record of associations whose thread is gone without a word; close what could not be closed."""
        if self._tls is not None and self._tls.reload():
            self._audit.certificate_reloaded()
        for opened in self._listed():
            if everything or not opened.association.is_alive():
                self._ended(opened.association)
        with self._lock:
            unclosed, self._unclosed = self._unclosed, []
        for opened in unclosed:
            self._let_go(opened)

    def _handlers(self) -> list[Any]:
        return [
            (evt.EVT_CONN_OPEN, _send_at_once),
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_ACCEPTED, self._on_accepted),
            (evt.EVT_USER_ID, lambda event: (True, None)),  # judged already, where one is wanted
            (evt.EVT_C_ECHO, lambda event: Status.SUCCESS),
            (evt.EVT_C_STORE, self._on_c_store),
            (evt.EVT_N_ACTION, self._on_n_action),
            (evt.EVT_N_EVENT_REPORT, lambda event: answer_report(event, self._reported)),
            (evt.EVT_RELEASED, self._on_released),
            (evt.EVT_ABORTED, lambda event: self._ended(event.assoc)),
            (evt.EVT_CONN_CLOSE, lambda event: self._ended(event.assoc)),
        ]

    # -- associations ---------------------------------------------------------------------------------------

    def _on_requested(self, event: Any) -> None:
        requestor = event.assoc.requestor
        identity = AssociationIdentity(
            association_id=uuid.uuid4().hex,
            calling_ae_title=_ae_title(requestor.primitive.calling_ae_title),
            called_ae_title=_ae_title(requestor.primitive.called_ae_title),
            address=str(requestor.address),
        )
        caller = _caller(event.assoc, identity)
        rejection = self._admit(event.assoc, identity, caller)
        if rejection is None:
            if self._admission.is_user_wanted(caller):
                self._audit.admitted(identity, caller.user)
            return
        self._note_rejection(identity, rejection)
        self._audit.rejected(identity, rejection, caller.user)
        event.assoc.acse.send_reject(*A_ASSOCIATE_RJ[rejection])
        event.assoc.is_rejected = True
        event.assoc.kill()

    def _admit(self, association: Any, identity: AssociationIdentity, caller: Caller) -> Rejection | None:
        """Judge and, in the same breath, count: two requests at once cannot both take the last place."""
        with self._lock:
            if self._stopping:
                return Rejection.STOPPING
            same = sum(o.identity.calling_ae_title == identity.calling_ae_title for o in self._open.values())
            rejection = self._admission.judge(caller, open_in_all=len(self._open), open_of_peer=same)
            if rejection is None:
                self._open[association] = _Open(identity, association, time.monotonic())
            return rejection

    def _note_rejection(self, identity: AssociationIdentity, rejection: Rejection) -> None:
        fields = {"calling_ae_title": identity.calling_ae_title, "called_ae_title": identity.called_ae_title}
        log.warning("association.rejected", reason=rejection.value, address=identity.address, **fields)
        self._note("association.rejected", reason=rejection.value, address=identity.address, **fields)

    def _on_accepted(self, event: Any) -> None:
        """Tell the operator what was refused: a scanner that cannot send one object often gives up the study."""
        refused = [UID(context.abstract_syntax).name for context in event.assoc.rejected_contexts]
        opened = self._open.get(event.assoc)
        if not refused or opened is None:
            return
        fields = {"calling_ae_title": opened.identity.calling_ae_title, "sop_classes": sorted(set(refused))}
        log.warning("presentation_context.refused", **fields)
        self._note("presentation_context.refused", **fields)

    def _on_released(self, event: Any) -> None:
        opened = self._open.get(event.assoc)
        if opened is not None:
            opened.released = True
        self._ended(event.assoc)

    def _ended(self, association: Any) -> None:
        """Close the books on an association; called once or more often, by whichever event comes first."""
        with self._lock:
            opened = self._open.pop(association, None)
            if opened is None:
                return
            opened.gone = True
            if opened.busy:  # its handler may still record an instance, and with it a hold on the series
                return
        self._close(opened)

    def _close(self, opened: _Open) -> None:
        if opened.touched:
            self._let_go(opened)
        self._audit.received(opened.identity, opened.transfers, is_released=opened.released)
        if opened.outcomes:
            log.info(
                "association.ended",
                calling_ae_title=opened.identity.calling_ae_title,
                address=opened.identity.address,
                how="released" if opened.released else "not released",
                seconds=round(time.monotonic() - opened.started, 2),
                megabytes=round(opened.bytes / 1e6, 3),
                **opened.outcomes,
            )

    def _let_go(self, opened: _Open) -> None:
        """Let go of the series that an association held; where the ledger is away, `reap` tries again."""
        try:
            self._ledger.arrivals.association_ended(
                opened.identity.association_id, released=opened.released, now=time.time()
            )
        except Unavailable as error:
            log.error("association.not_closed", reason=str(error))
            with self._lock:
                self._unclosed.append(opened)

    def _listed(self) -> list[_Open]:
        with self._lock:
            return list(self._open.values())

    # -- C-STORE --------------------------------------------------------------------------------------------

    def _on_c_store(self, event: Any) -> int | Dataset:
        with self._flying(event.assoc) as opened:
            if opened is None:  # it was ended while the message lay in the queue
                return _answer(Status.PROCESSING_FAILURE, "The association is being closed")
            try:
                if self._stopping:
                    raise Unavailable("The node is stopping")
                return self._store(event, opened)
            except InvalidInstance as error:
                return self._refused(opened, error.status, str(error), error.offending_element)
            except Unavailable as error:
                return self._refused(opened, Status.OUT_OF_RESOURCES, str(error))
            except Exception as error:  # a defect of ours must not cost the sender its association
                log.exception("store.defect", error=type(error).__name__)
                return self._refused(opened, Status.PROCESSING_FAILURE, "Internal error")

    def _store(self, event: Any, opened: _Open) -> int:
        request = event.request
        data = request.DataSet
        if data is None:
            raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The C-STORE request has no data set")
        if isinstance(data, TooLarge):
            raise Unavailable("Larger than receive.maximum_instance_megabytes")
        view = data.getbuffer()
        opened.touched = True
        outcome, header = self._intake.keep(
            view,
            transfer_syntax_uid=str(event.context.transfer_syntax),
            affected_sop_class_uid=str(request.AffectedSOPClassUID),
            affected_sop_instance_uid=str(request.AffectedSOPInstanceUID),
            association=opened.identity,
        )
        opened.transfers.add(header, outcome)
        opened.bytes += len(view)
        opened.outcomes[outcome] = opened.outcomes.get(outcome, 0) + 1
        if outcome is Outcome.QUARANTINED:
            log.warning("instance.quarantined", calling_ae_title=opened.identity.calling_ae_title)
        return Status.SUCCESS

    # -- storage commitment ---------------------------------------------------------------------------------

    def _on_n_action(self, event: Any) -> tuple[int | Dataset, None]:
        if self._promising is None or not self._settings.commitment.answer:
            return _answer(Status.NOT_AUTHORISED, "commitment.answer = false: this node promises nothing"), None
        return self._promising.on_request(event, _ae_title(event.assoc.requestor.ae_title))

    def _reported(self, report: Report) -> bool:
        patience = self._settings.delivery.patience
        known = self._ledger.commitments.reported(report, now=time.time(), patience=patience)
        fields = {"committed": len(report.committed), "failed": len(report.failed)}
        log.info("commitment.received" if known else "commitment.unknown", **fields)
        return known

    def _refused(self, opened: _Open, status: int, comment: str, offending_element: int | None = None) -> Dataset:
        opened.outcomes["refused"] = opened.outcomes.get("refused", 0) + 1
        title = opened.identity.calling_ae_title
        log.warning("store.refused", status=f"0x{status:04X}", reason=comment, calling_ae_title=title)
        return _answer(status, comment, offending_element)

    @contextmanager
    def _flying(self, association: Any) -> Iterator[_Open | None]:
        """Count an instance as in flight while its handler runs, and its association as busy."""
        with self._lock:
            self._in_flight += 1
            opened = self._open.get(association)
            if opened is not None:
                opened.busy = True
        try:
            yield opened
        finally:
            with self._lock:
                self._in_flight -= 1
                if opened is not None:
                    opened.busy = False
            if opened is not None and opened.gone:
                self._close(opened)

    def _note(self, name: str, **fields: Any) -> None:
        try:
            self._ledger.history.note(name, now=time.time(), **fields)
        except Unavailable as error:
            log.error("event.lost", event_name=name, reason=str(error))


def _ae_title(sent: Any) -> str:
    """Return an AE title without what must not be in one (PS3.5 6.2): a database may refuse to hold it."""
    return "".join(letter for letter in str(sent or "") if " " <= letter <= "~").strip()


def _caller(association: Any, identity: AssociationIdentity) -> Caller:
    """Return who asks, with the certificate that TLS has verified and the user that is named (PS3.7 D.3.3.7)."""
    connection = association.dul.socket.socket
    certificate = connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None
    user = association.requestor.user_identity
    if user is not None and user.user_identity_type not in _NAMED:
        user = None  # a token that the node cannot verify names nobody
    return Caller(
        identity.called_ae_title,
        identity.calling_ae_title,
        identity.address,
        fingerprint(certificate),
        (user.primary_field or b"").decode(errors="replace") if user else "",
        (user.secondary_field or b"").decode(errors="replace") if user else "",
    )


def _answer(status: int, comment: str, offending_element: int | None = None) -> Dataset:
    """Return the status elements of a response (PS3.7 Annex C)."""
    answer = Dataset()
    answer.Status = int(status)
    answer.ErrorComment = comment[:_ERROR_COMMENT]
    if offending_element is not None:
        answer.OffendingElement = [offending_element]
    return answer


def _send_at_once(event: Any) -> None:
    """Set TCP_NODELAY: a response that waits for the sender's delayed acknowledgement costs 40 ms each."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
