"""Results out by C-STORE: one association, the bytes as they were written."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydicom import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, RLELossless
from pynetdicom import AE, _config, build_role, evt
from pynetdicom.association import Association
from pynetdicom.status import code_to_category

from dicom_node import rations, sockets, turns
from dicom_node.commitment import STORAGE_COMMITMENT, Reference
from dicom_node.config import DeliveryTable, Peer
from dicom_node.decoders import compressed_frames
from dicom_node.delivery.pacing import pace
from dicom_node.errors import PeerBusy, PeerRefused, PeerUnreachable, Refused
from dicom_node.rations import understood
from dicom_node.services import (
    RESULT_SOP_CLASSES,
    RESULT_TRANSFER_SYNTAXES,
    VERIFICATION,
    Verdict,
    transfer_syntaxes,
    verdict,
)
from dicom_node.tls import client_context

sockets.amend()
turns.amend()

IMPLICIT = RESULT_TRANSFER_SYNTAXES[-1]
_PLAIN = frozenset({*RESULT_TRANSFER_SYNTAXES, str(RLELossless)})  # what can be re-encoded in the default without loss
_REJECTED_PERMANENTLY = 0x01  # PS3.8 Table 9-21


@dataclass(frozen=True, slots=True)
class Parcel:
    """One file to send, and what its meta information says of it."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    path: Path

    @classmethod
    def of_file(cls, path: Path) -> Parcel:
        """Read what there is to send from a file's meta information; raise Refused where it has none (PS3.10)."""
        try:
            meta = read_file_meta_info(path)
            named = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID
            if not all(isinstance(uid, UID) and uid.is_valid for uid in named):
                raise ValueError("not a UID")
        except Exception as error:
            # pydicom answers a file of another kind with whatever exception comes first
            raise Refused(f"{path}: not a DICOM file (PS3.10)") from error
        return cls(str(named[0]), str(named[1]), str(named[2]), path)


Answers = Mapping[tuple[str, str], bool]
"""For each `(SOP Class UID, transfer syntax UID)` that was proposed, whether the peer accepted it."""


def deliver(
    parcels: Sequence[Parcel],
    peer: Peer,
    *,
    ae_title: str,
    timing: DeliveryTable,
    choose: Callable[[Answers], Sequence[Parcel]] | None = None,
    sent: Callable[[Parcel, int], None] = lambda parcel, status: None,
    asking: Asking | None = None,
    begins: Callable[[str], None] = lambda stage: None,
) -> list[tuple[str, int]]:
    """Send parcels on one association; return `(SOP Instance UID, status)` for each that was sent.

    `choose` is told what the peer answered to the presentation contexts and returns what to send; without it
    everything is sent. `sent` is called after each one that the peer has stored. With `asking` the peer is then
    asked, on the same association, to commit what was stored. `begins` is told what begins once there is an
    association: "send", "commit", "release".

    Raises:
        PeerUnreachable: no association; PeerBusy: a status that means "later", or the association broke.
        PeerRefused: rejected for good, no presentation context, or a status that means "no".
    """
    contexts = contexts_for(parcels) + ([(STORAGE_COMMITMENT, IMPLICIT)] if asking else [])
    handlers = asking.handlers if asking else ()
    with Associated(
        peer, contexts, ae_title=ae_title, timing=timing, may_take_nothing=choose is not None, handlers=handlers
    ) as association:
        begins("send")
        statuses = []
        chosen = choose(_answers(association)) if choose else parcels
        for parcel in chosen:
            status = _send(association, parcel)
            statuses.append((parcel.sop_instance_uid, status))
            sent(parcel, status)
        if asking and association.is_established:
            begins("commit")
            asking.ask(association, [Reference(parcel.sop_class_uid, parcel.sop_instance_uid) for parcel in chosen])
        begins("release")
        return statuses


class Asking(Protocol):
    """Asks a peer to commit what it has stored; see `delivery.commit`."""

    @property
    def handlers(self) -> Sequence[Any]:
        """Return what the association needs to take the peer's report."""

    def ask(self, association: Association, stored: Sequence[Reference]) -> None:
        """Ask about what was `stored`, and whatever else there is to ask about."""


def contexts_for(parcels: Sequence[Parcel]) -> list[tuple[str, str]]:
    """Return `(SOP Class, transfer syntax)` to propose: each file's own, and for an uncompressed one the default."""
    own = {(parcel.sop_class_uid, parcel.transfer_syntax_uid) for parcel in parcels}
    plain = {(sop_class_uid, IMPLICIT) for sop_class_uid, syntax in own if syntax in _PLAIN}
    return sorted(own | plain)


def probe(peer: Peer, *, ae_title: str, timing: DeliveryTable) -> Answers:
    """Ask a peer by association which result objects it takes, in which transfer syntaxes; nothing is sent.

    Raises:
        PeerUnreachable: no association could be made; PeerRefused: it was rejected for good.
    """
    contexts = [
        (sop_class_uid, syntax) for sop_class_uid in RESULT_SOP_CLASSES for syntax in transfer_syntaxes(sop_class_uid)
    ]
    with Associated(peer, contexts, ae_title=ae_title, timing=timing, may_take_nothing=True) as association:
        return _answers(association)


def echo(peer: Peer, *, ae_title: str, timing: DeliveryTable) -> None:
    """Send one C-ECHO; raise PeerUnreachable, PeerBusy or PeerRefused where it does not succeed."""
    with Associated(peer, [(VERIFICATION, IMPLICIT)], ae_title=ae_title, timing=timing) as peered:
        _judge(peered.send_c_echo(), "C-ECHO")


class Associated:
    """An association for the length of a `with` block: released at its end, aborted on an error."""

    def __init__(
        self,
        peer: Peer,
        contexts: Sequence[tuple[str, str]],
        *,
        ae_title: str,
        timing: DeliveryTable,
        may_take_nothing: bool = False,
        handlers: Sequence[Any] = (),
        as_scp: bool = False,
    ) -> None:
        """Prepare it; with `as_scp` the node takes the SCP's part in every context (PS3.7 D.3.3.4)."""
        self._peer = peer
        self._handlers = [(evt.EVT_CONN_OPEN, _send_at_once), *handlers]
        self._roles: list[Any] = [build_role(uid, scp_role=True) for uid, _ in contexts] if as_scp else []
        self._may_take_nothing = may_take_nothing
        entity = AE(ae_title=peer.calling_ae_title or ae_title)
        entity.connection_timeout = timing.connect_timeout
        entity.acse_timeout = timing.connect_timeout
        entity.dimse_timeout = timing.response_timeout
        entity.network_timeout = timing.response_timeout
        for sop_class_uid, syntax in contexts:
            # one context for each syntax: the peer's choice leaves no doubt
            entity.add_requested_context(sop_class_uid, syntax)
        self._entity = entity
        self._association: Association | None = None

    def __enter__(self) -> Association:
        """Associate; raise PeerUnreachable or PeerRefused where that fails."""
        peer = self._peer
        try:
            association = self._entity.associate(
                peer.host,
                peer.port,
                ae_title=peer.ae_title,
                evt_handlers=self._handlers,
                ext_neg=self._roles or None,
                tls_args=self._tls_args(),
            )
        except (OSError, RuntimeError) as error:
            raise PeerUnreachable(f"{peer.ae_title} at {peer.host}:{peer.port}: {type(error).__name__}") from error
        refused_all = association.is_aborted and association.rejected_contexts
        if association.is_established or (refused_all and self._may_take_nothing):
            self._association = association
            pace(association)
            return association
        answer: Any = association.acceptor.primitive
        if association.is_rejected and answer.result == _REJECTED_PERMANENTLY:
            raise PeerRefused(f"{peer.ae_title} rejects the association for good: {answer.reason_str}")
        if refused_all:
            raise PeerRefused(f"{peer.ae_title} accepts none of the SOP classes of the results")
        silent = (
            "does not answer, or TLS was not agreed on (tls_ca, tls_name, certificate)"
            if peer.tls
            else "does not answer"
        )
        what = "rejects the association for now" if association.is_rejected else silent
        raise PeerUnreachable(f"{peer.ae_title} at {peer.host}:{peer.port} {what}")

    def _tls_args(self) -> tuple[ssl.SSLContext, str] | None:
        """Return what a peer with `tls = true` is spoken to with; its files are read anew for each association."""
        return (client_context(self._peer), self._peer.tls_name or self._peer.host) if self._peer.tls else None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Release, or abort on an error."""
        if self._association is None or not self._association.is_established:
            return
        if kind is None:
            self._association.release()
        else:
            self._association.abort()


def _answers(association: Association) -> Answers:
    answers = {
        (str(context.abstract_syntax), str(context.transfer_syntax[0])): False
        for context in association.rejected_contexts
    }
    for context in association.accepted_contexts:
        answers[str(context.abstract_syntax), str(context.transfer_syntax[0])] = True
    return answers


def _send(association: Association, parcel: Parcel) -> int:
    accepted = {
        context.transfer_syntax[0]
        for context in association.accepted_contexts
        if context.abstract_syntax == parcel.sop_class_uid
    }
    as_it_is = parcel.transfer_syntax_uid in accepted
    if not as_it_is and IMPLICIT not in accepted:
        raise PeerRefused(f"the peer accepts no presentation context for SOP Class {parcel.sop_class_uid}")
    # a file in an accepted syntax goes out byte by byte; only a peer without it gets it re-encoded
    _config.STORE_SEND_CHUNKED_DATASET = as_it_is
    what: Any = parcel.path if as_it_is else _plain(parcel.path)
    try:
        response = association.send_c_store(what)
    except (RuntimeError, ValueError, OSError) as error:
        raise PeerBusy(f"the association broke: {type(error).__name__}") from error
    except AttributeError as error:
        raise Refused("the file's data set lacks the UIDs that C-STORE names it by") from error
    return _judge(response, "C-STORE")


def _plain(path: Path) -> Dataset:
    """Return a file's dataset without compression; pynetdicom writes it in the syntax that was accepted."""
    with understood():
        dataset = rations.read(path)
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            rations.require_plausible(dataset, path.stat().st_size)
            compressed_frames(path, dataset, range(int(dataset.get("NumberOfFrames") or 1)))
            dataset.decompress(generate_instance_uid=False)
        return dataset


def _judge(response: Any, service: str) -> int:
    status = response.get("Status")
    if status is None:
        raise PeerBusy(f"no answer to {service}: the association broke or timed out")
    meaning = verdict(int(status))
    if meaning is Verdict.STORED:
        return int(status)
    # the peer's Error Comment stays out: it may quote the patient
    message = f"{service} answered 0x{int(status):04X} ({code_to_category(int(status))})"
    raise PeerBusy(message) if meaning is Verdict.AGAIN else PeerRefused(message)


def _send_at_once(event: Any) -> None:
    """Set TCP_NODELAY on the way out as well."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
