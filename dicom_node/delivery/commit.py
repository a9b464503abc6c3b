"""Storage commitment on the wire (PS3.4 Annex J): ask a peer to commit, and report to one that has asked the node."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, cast

from pydicom import Dataset
from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.dsutils import encode

from dicom_node.collecting import is_dropped
from dicom_node.commitment import (
    REQUEST,
    STORAGE_COMMITMENT,
    STORAGE_COMMITMENT_INSTANCE,
    Malformed,
    Reference,
    Report,
    Request,
    read_report,
    report_dataset,
    request_dataset,
)
from dicom_node.config import DeliveryTable, Peer
from dicom_node.delivery.cstore import IMPLICIT, Associated
from dicom_node.errors import PeerBusy, PeerRefused
from dicom_node.services import Status

_POLL = 0.05


@dataclass(frozen=True, slots=True)
class Question:
    """Asks a peer to commit: what is stored now, and what else it holds already.

    `before` is called with everything that is asked about just before the request leaves and returns its
    Transaction UID; `reported` takes a report that comes on the same association; `is_answered` says that
    nothing more has to be waited for, on whichever association it came; `wait` is in seconds.
    """

    peer: Peer
    held_already: tuple[Reference, ...]
    before: Callable[[Sequence[Reference]], str]
    reported: Callable[[Report], bool]
    is_answered: Callable[[], bool]
    wait: float

    @property
    def handlers(self) -> Sequence[Any]:
        """Return what takes an N-EVENT-REPORT on the association that asked."""
        return [(evt.EVT_N_EVENT_REPORT, lambda event: answer_report(event, self.reported))]

    def ask(self, association: Association, stored: Sequence[Reference]) -> None:
        """Send the N-ACTION, then give the report some seconds to come before the association ends.

        Raises:
            PeerRefused: the peer offers no storage commitment, or answered with a status that means "no".
            PeerBusy: no answer, or a status that means "later".
        """
        references = (*stored, *self.held_already)
        if not references:
            return
        accepted = {context.abstract_syntax for context in association.accepted_contexts}
        if STORAGE_COMMITMENT not in accepted:
            raise PeerRefused(
                f"{self.peer.ae_title} offers no storage commitment: set commitment = false for it, or enable it there"
            )
        request = Request(self.before(references), references)
        try:
            response, _ = association.send_n_action(
                request_dataset(request), REQUEST, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise PeerBusy(f"the association broke: {type(error).__name__}") from error
        _judge(response, "N-ACTION")
        deadline = time.monotonic() + self.wait
        while time.monotonic() < deadline and association.is_established and not self.is_answered():
            time.sleep(_POLL)


def ask(question: Question, *, ae_title: str, timing: DeliveryTable) -> None:
    """Ask about what the peer holds already, on an association of its own."""
    contexts = [(STORAGE_COMMITMENT, IMPLICIT)]
    with Associated(
        question.peer, contexts, ae_title=ae_title, timing=timing, handlers=question.handlers
    ) as association:
        question.ask(association, ())


def answer_report(event: Any, reported: Callable[[Report], bool]) -> tuple[int | Dataset, None]:
    """Answer an N-EVENT-REPORT, whichever association it came on; `reported` says whether it was asked for."""
    information = event.request.EventInformation
    if is_dropped(information):
        return failure(Status.RESOURCE_LIMITATION, "The event information is too large"), None
    try:
        report = read_report(encoded(information), is_implicit=event.context.transfer_syntax == IMPLICIT)
    except Malformed as error:
        return failure(Status.INVALID_ARGUMENT_VALUE, str(error)), None
    if not reported(report):
        return failure(Status.INVALID_ARGUMENT_VALUE, "Nothing was asked under this Transaction UID"), None
    return Status.SUCCESS, None


def encoded(data_set: BytesIO | None) -> bytes:
    """Return the bytes of a message's data set; empty where it has none."""
    return data_set.getvalue() if data_set is not None else b""


def failure(status: int, comment: str) -> Dataset:
    """Return the status elements of an N-service response (PS3.7 Annex C)."""
    answer = Dataset()
    answer.Status = int(status)
    answer.ErrorComment = comment[:64]
    return answer


def report(peer: Peer, said: Report, *, ae_title: str, timing: DeliveryTable) -> None:
    """Send an N-EVENT-REPORT on a new association, as its SCP by role selection (J.3.3).

    Raises:
        PeerUnreachable, PeerBusy: again later. PeerRefused: the peer does not take it.
    """
    contexts = [(STORAGE_COMMITMENT, IMPLICIT)]
    with Associated(peer, contexts, ae_title=ae_title, timing=timing, as_scp=True) as association:
        try:
            response, _ = association.send_n_event_report(
                report_dataset(said), said.event_type_id, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise PeerBusy(f"the association broke: {type(error).__name__}") from error
        _judge(response, "N-EVENT-REPORT")


def report_on(association: Association, said: Report) -> None:
    """Send an N-EVENT-REPORT on the association that the request came on; raise PeerBusy where it ends meanwhile.

    Whatever its peer sends before it answers is served as ever: the next request, say, or the release.
    """
    context = next((each for each in association.accepted_contexts if each.abstract_syntax == STORAGE_COMMITMENT), None)
    if context is None or not association.is_established or association.dul.peek_next_pdu() is not None:
        raise PeerBusy("the association that asked is being released")
    request = event_report(said, UID(context.transfer_syntax[0]))
    response = cast(Any, association.dimse).ask(request, context.context_id)
    _judge({} if response is None else {"Status": response.Status}, "N-EVENT-REPORT")


def event_report(said: Report, transfer_syntax_uid: UID) -> N_EVENT_REPORT:
    """Return the request that carries a report (PS3.7 10.1.1, PS3.4 J.3.3), all but its Message ID."""
    syntax = transfer_syntax_uid
    information = encode(report_dataset(said), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    if information is None:  # pynetdicom's word for what it cannot encode: nothing empty is sent instead
        raise ValueError("the report cannot be encoded")
    request = N_EVENT_REPORT()
    request.AffectedSOPClassUID = UID(STORAGE_COMMITMENT)
    request.AffectedSOPInstanceUID = UID(STORAGE_COMMITMENT_INSTANCE)
    request.EventTypeID = said.event_type_id
    request.EventInformation = BytesIO(information)
    return request


_AGAIN = frozenset({0x0110, 0x0213})  # processing failure, resource limitation (PS3.7 Annex C)


def _judge(response: Any, service: str) -> None:
    status = response.get("Status")
    if status is None:
        raise PeerBusy(f"no answer to {service}: the association broke or timed out")
    if int(status) == Status.SUCCESS or int(status) & 0xF000 == 0xB000 or int(status) in (0x0001, 0x0107, 0x0116):
        return
    message = f"{service} answered 0x{int(status):04X}"
    raise PeerBusy(message) if int(status) in _AGAIN else PeerRefused(message)
