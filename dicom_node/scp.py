"""The listening side: Verification, Storage, Storage Commitment. Every handler hands over at once; nothing decides."""

from __future__ import annotations

import resource
import socket
import ssl
import threading
import time
from functools import partial
from typing import Any

import structlog
from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import AE, _config, evt

from dicom_node.associations import Associations, Opened
from dicom_node.audit import Audit
from dicom_node.collecting import is_dropped
from dicom_node.commitment import STORAGE_COMMITMENT, Report
from dicom_node.config import Settings
from dicom_node.delivery.commit import answer_report
from dicom_node.entities import AssociationIdentity
from dicom_node.errors import NodeError, SettingsError, listening
from dicom_node.intake import Intake
from dicom_node.landing import pour
from dicom_node.ledger import Ledger
from dicom_node.listening import GuardedServer, require_free
from dicom_node.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom_node.pdata import StoreRequest
from dicom_node.places import Places
from dicom_node.promising import Promising
from dicom_node.recorder import Recorder
from dicom_node.services import (
    A_ASSOCIATE_RJ,
    RESULT_TRANSFER_SYNTAXES,
    STORAGE_SOP_CLASSES,
    TRANSFER_SYNTAXES,
    VERIFICATION,
    Answer,
    Caller,
    Rejection,
    Status,
)
from dicom_node.storing import Storing
from dicom_node.tls import Reloading, fingerprint
from dicom_node.wire import Limits

log = structlog.get_logger()

_UNASSOCIATED = 100  # connections beyond the limit of associations, so that who comes too much is told
_OF_EACH, _OF_OTHERS = 3, 320  # descriptors: a connection's own, its bell and its file; those of slots and all else
_MEGABYTE = 1024 * 1024
_NAMED = (1, 2)  # types of user identity: a user name, with or without a passcode (PS3.7 D.3.3.7)
_ERROR_COMMENT = 64  # characters in a VR of LO


class Scp:
    """The node's own application entity."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        intake: Intake,
        recorder: Recorder,
        promising: Promising | None = None,
        audit: Audit | None = None,
        places: Places | None = None,
        joins: bool = False,
    ) -> None:
        """Prepare to listen; `start` does. Without `promising` nothing is promised to those who ask.

        `places` counts the associations of every process that receives, where there are others; one that `joins` them
        listens where the node does already.
        """
        self._promising = promising
        self._audit = audit or Audit(settings, ledger)
        self._settings = settings
        self._ledger = ledger
        self._intake = intake
        self._associations = Associations(settings.admission, recorder.ended, places)
        self._joins = joins
        self._servers: list[Any] = []
        self._tls: Reloading | None = None

    # -- life -----------------------------------------------------------------------------------------------

    def start(self) -> int:
        """Listen; return the port. Raises SettingsError where it is taken."""
        receive, node = self._settings.receive, self._settings.node
        _require_descriptors(_OF_EACH * (receive.maximum_associations + _UNASSOCIATED) + _OF_OTHERS)
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

    def _listen(self, entity: AE, port: int, tls: Reloading | None = None) -> None:
        host, is_shared = self._settings.node.host, self._settings.receive.processes > 1
        with listening("node.host, node.port" if tls is None else "node.host, tls.port", host, port):
            if is_shared and not self._joins:
                require_free(host, port)
            server: Any = entity.make_server(
                (host, port),
                server_class=GuardedServer,
                evt_handlers=self._handlers(),
                limits=self._limits(),
                store=self._store,
                shares_port=is_shared,
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
            association_timeout=receive.association_timeout,
            network_timeout=receive.network_timeout,
            maximum_connections=receive.maximum_associations + _UNASSOCIATED,
            maximum_connections_per_address=receive.maximum_connections_per_address,
        )

    def stop(self, *, grace: float = 10.0) -> None:
        """Stop listening, finish the instances in flight, then end what is still open."""
        self._associations.is_stopping = True
        if not self._servers:
            return
        deadline = time.monotonic() + grace
        while self._associations.at_work and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # the response to the last instance leaves after it has become durable
        for opened in self._associations.listed():
            opened.association.abort(block=False)
        for server in self._servers:
            server.shutdown()
        self._servers = []
        self.reap(everything=True)

    def reap(self, *, everything: bool = False) -> None:
        """End the record of associations whose thread is gone without a word."""
        if self._tls is not None and self._tls.reload():
            self._audit.certificate_reloaded()
        for opened in self._associations.listed():
            if everything or not opened.association.is_alive():
                self._associations.ended(opened.association)

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
            (evt.EVT_RELEASED, lambda event: self._associations.released(event.assoc)),
            (evt.EVT_ABORTED, lambda event: self._associations.ended(event.assoc)),
            (evt.EVT_CONN_CLOSE, lambda event: self._associations.ended(event.assoc)),
        ]

    # -- associations ---------------------------------------------------------------------------------------

    def _on_requested(self, event: Any) -> None:
        caller = _caller(event.assoc)
        rejection = self._associations.admit(event.assoc, caller)
        if rejection is None:
            if self._settings.admission.is_user_wanted(caller):
                self._audit.admitted(_identity(caller), caller.user)
            return
        self._note_rejection(caller, rejection)
        self._audit.rejected(_identity(caller), rejection, caller.user)
        event.assoc.acse.send_reject(*A_ASSOCIATE_RJ[rejection])
        event.assoc.is_rejected = True
        event.assoc.kill()

    def _note_rejection(self, caller: Caller, rejection: Rejection) -> None:
        fields = {"calling_ae_title": caller.calling_ae_title, "called_ae_title": caller.called_ae_title}
        log.warning("association.rejected", reason=rejection.value, address=caller.address, **fields)
        self._note("association.rejected", reason=rejection.value, address=caller.address, **fields)

    def _on_accepted(self, event: Any) -> None:
        """Tell the operator what was refused: a scanner that cannot send one object often gives up the study."""
        refused = [UID(context.abstract_syntax).name for context in event.assoc.rejected_contexts]
        opened = self._associations.get(event.assoc)
        if not refused or opened is None:
            return
        fields = {"calling_ae_title": opened.identity.calling_ae_title, "sop_classes": sorted(set(refused))}
        log.warning("presentation_context.refused", **fields)
        self._note("presentation_context.refused", **fields)

    # -- C-STORE --------------------------------------------------------------------------------------------

    def _store(self, association: Any, context_id: int, request: StoreRequest, room: memoryview) -> Storing | None:
        """Return what takes a request as its bytes come; None where pynetdicom shall answer it."""
        opened, context = self._associations.get(association), association._accepted_cx.get(context_id)
        if opened is None or context is None or not context.as_scp:
            return None
        named = request.affected_sop_class_uid, request.affected_sop_instance_uid
        return self._storing(opened, *named, str(context.transfer_syntax[0]), room)

    def _on_c_store(self, event: Any) -> int | Dataset:
        """Take a request that pynetdicom has collected: one that shares a PDU with the message before it, say."""
        opened, request, data = self._associations.get(event.assoc), event.request, event.request.DataSet
        if opened is None:  # it was ended while the message lay in the queue
            return _answered(Answer(Status.PROCESSING_FAILURE, "The association is being closed"))
        if is_dropped(data):
            return _answered(Answer(Status.OUT_OF_RESOURCES, "Too large for a request of this form"))
        named = str(request.AffectedSOPClassUID), str(request.AffectedSOPInstanceUID)
        storing = self._storing(opened, *named, str(event.context.transfer_syntax))
        if data is not None:
            pour(data.getbuffer(), storing)
        return _answered(storing.answer())

    def _storing(
        self,
        opened: Opened,
        sop_class_uid: str,
        sop_instance_uid: str,
        transfer_syntax_uid: str,
        room: memoryview | None = None,
    ) -> Storing:
        begin = partial(
            self._intake.begin,
            affected_sop_class_uid=sop_class_uid,
            affected_sop_instance_uid=sop_instance_uid,
            transfer_syntax_uid=transfer_syntax_uid,
            association=opened.identity,
            room=room,
            expected=opened.latest,
        )
        maximum = self._settings.receive.maximum_instance_megabytes * _MEGABYTE
        return Storing(self._associations, opened, begin, maximum=maximum)

    # -- storage commitment ---------------------------------------------------------------------------------

    def _on_n_action(self, event: Any) -> tuple[int | Dataset, None]:
        if self._promising is None or not self._settings.commitment.answer:
            return _answered(
                Answer(Status.NOT_AUTHORISED, "commitment.answer = false: this node promises nothing")
            ), None
        return self._promising.on_request(event, _ae_title(event.assoc.requestor.ae_title))

    def _reported(self, report: Report) -> bool:
        patience = self._settings.delivery.patience
        known = self._ledger.commitments.reported(report, now=time.time(), patience=patience)
        fields = {"committed": len(report.committed), "failed": len(report.failed)}
        log.info("commitment.received" if known else "commitment.unknown", **fields)
        return known

    def _note(self, name: str, **fields: Any) -> None:
        try:
            self._ledger.history.note(name, now=time.time(), **fields)
        except NodeError as error:
            log.error("event.lost", event_name=name, reason=str(error))


def _require_descriptors(number: int) -> None:
    """Allow this process so many descriptors, where it is allowed to allow itself as many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    allowed = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < number:
        log.warning("descriptors.few", allowed=allowed, needed=number)


def _ae_title(sent: Any) -> str:
    """Return an AE title without what must not be in one (PS3.5 6.2): a database may refuse to hold it."""
    return "".join(letter for letter in str(sent or "") if " " <= letter <= "~").strip()


def _caller(association: Any) -> Caller:
    """Return who asks, with the certificate that TLS has verified and the user that is named (PS3.7 D.3.3.7)."""
    connection, requestor = association.dul.socket.socket, association.requestor
    certificate = connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None
    user = requestor.user_identity
    if user is not None and user.user_identity_type not in _NAMED:
        user = None  # a token that the node cannot verify names nobody
    return Caller(
        _ae_title(requestor.primitive.called_ae_title),
        _ae_title(requestor.primitive.calling_ae_title),
        str(requestor.address),
        fingerprint(certificate),
        (user.primary_field or b"").decode(errors="replace") if user else "",
        (user.secondary_field or b"").decode(errors="replace") if user else "",
    )


def _identity(caller: Caller) -> AssociationIdentity:
    return AssociationIdentity("", caller.calling_ae_title, caller.called_ae_title, caller.address)


def _answered(answer: Answer) -> Dataset:
    """Return the status elements of a response (PS3.7 Annex C)."""
    dataset = Dataset()
    dataset.Status = int(answer.status)
    if answer.comment:
        dataset.ErrorComment = answer.comment[:_ERROR_COMMENT]
    if answer.offending_element is not None:
        dataset.OffendingElement = [answer.offending_element]
    return dataset


def _send_at_once(event: Any) -> None:
    """Set TCP_NODELAY: a response that waits for the sender's delayed acknowledgement costs 40 ms each."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
