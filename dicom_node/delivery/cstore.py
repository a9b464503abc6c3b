"""Results out by C-STORE: one association, the bytes as they were written."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.filereader import read_file_meta_info
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.status import code_to_category

from dicom_node.config import DeliveryTable, Peer
from dicom_node.errors import PeerBusy, PeerRefused, PeerUnreachable, Refused
from dicom_node.services import RESULT_TRANSFER_SYNTAXES, VERIFICATION, Verdict, verdict

IMPLICIT = RESULT_TRANSFER_SYNTAXES[-1]
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
        except Exception as error:
            # pydicom answers a file of another kind with whatever exception comes first
            raise Refused(f"{path}: not a DICOM file (PS3.10)") from error
        return cls(str(named[0]), str(named[1]), str(named[2]), path)


def deliver(
    parcels: Sequence[Parcel],
    peer: Peer,
    *,
    ae_title: str,
    timing: DeliveryTable,
    sent: Callable[[Parcel, int], None] = lambda parcel, status: None,
) -> list[tuple[str, int]]:
    """Send every parcel on one association; return `(SOP Instance UID, status)` for each.

    `sent` is called after each one that the peer has stored.

    Raises:
        PeerUnreachable: no association; PeerBusy: a status that means "later", or the association broke.
        PeerRefused: rejected for good, no presentation context, or a status that means "no".
    """
    with _Associated(peer, contexts_for(parcels), ae_title=ae_title, timing=timing) as association:
        statuses = []
        for parcel in parcels:
            status = _send(association, parcel)
            statuses.append((parcel.sop_instance_uid, status))
            sent(parcel, status)
        return statuses


def contexts_for(parcels: Sequence[Parcel]) -> list[tuple[str, str]]:
    """Return `(SOP Class, transfer syntax)` to propose: each file's own, and for an uncompressed one the default."""
    own = {(parcel.sop_class_uid, parcel.transfer_syntax_uid) for parcel in parcels}
    plain = {(sop_class_uid, IMPLICIT) for sop_class_uid, syntax in own if syntax in RESULT_TRANSFER_SYNTAXES}
    return sorted(own | plain)


def echo(peer: Peer, *, ae_title: str, timing: DeliveryTable) -> None:
    """Send one C-ECHO; raise PeerUnreachable, PeerBusy or PeerRefused where it does not succeed."""
    with _Associated(peer, [(VERIFICATION, IMPLICIT)], ae_title=ae_title, timing=timing) as peered:
        _judge(peered.send_c_echo(), "C-ECHO")


class _Associated:
    """An association for the length of a `with` block: released at its end, aborted on an error."""

    def __init__(
        self, peer: Peer, contexts: Sequence[tuple[str, str]], *, ae_title: str, timing: DeliveryTable
    ) -> None:
        self._peer = peer
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
        peer = self._peer
        try:
            association = self._entity.associate(
                peer.host, peer.port, ae_title=peer.ae_title, evt_handlers=[(evt.EVT_CONN_OPEN, _send_at_once)]
            )
        except (OSError, RuntimeError) as error:
            raise PeerUnreachable(f"{peer.ae_title} at {peer.host}:{peer.port}: {type(error).__name__}") from error
        if association.is_established:
            self._association = association
            return association
        answer: Any = association.acceptor.primitive
        if association.is_rejected and answer.result == _REJECTED_PERMANENTLY:
            raise PeerRefused(f"{peer.ae_title} rejects the association for good: {answer.reason_str}")
        if association.is_aborted and association.rejected_contexts:
            raise PeerRefused(f"{peer.ae_title} accepts none of the SOP classes of the results")
        what = "rejects the association for now" if association.is_rejected else "does not answer"
        raise PeerUnreachable(f"{peer.ae_title} at {peer.host}:{peer.port} {what}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._association is None or not self._association.is_established:
            return
        if kind is None:
            self._association.release()
        else:
            self._association.abort()


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
    try:
        what: Any = parcel.path if as_it_is else dcmread(parcel.path)
        response = association.send_c_store(what)
    except (RuntimeError, ValueError, OSError) as error:
        raise PeerBusy(f"the association broke: {type(error).__name__}") from error
    return _judge(response, "C-STORE")


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
