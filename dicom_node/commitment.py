"""Storage commitment (PS3.4 Annex J): what is asked and answered, as values. Nothing here acts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

from pydicom import Dataset

from dicom_node.elements import Bytes, NotUnderstood, Place, items, scan

STORAGE_COMMITMENT = "1.2.840.10008.1.20.1"
"""Storage Commitment Push Model SOP Class."""
STORAGE_COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
"""Its well-known SOP Instance, which every request and report is about."""

REQUEST = 1  # Action Type ID (J.3.2)
ALL_COMMITTED = 1  # Event Type ID (J.3.3)
SOME_FAILED = 2
MAXIMUM_REFERENCES = 100_000
"""Instances in one request; a study of more is asked about in parts."""
_LONGEST_UID = 64
_TAGS = {"TransactionUID": 0x00081195, "FailedSOPSequence": 0x00081198, "ReferencedSOPSequence": 0x00081199}
_SOP_CLASS, _SOP_INSTANCE, _FAILURE_REASON = 0x00081150, 0x00081155, 0x00081197
_OF_AN_ITEM = frozenset({_SOP_CLASS, _SOP_INSTANCE, _FAILURE_REASON})
_OF_UIDS = frozenset("0123456789.")


class FailureReason(IntEnum):
    """Failure Reason (0008,1197) of an instance that is not committed (PS3.3 C.14.1.1)."""

    PROCESSING_FAILURE = 0x0110
    NO_SUCH_OBJECT_INSTANCE = 0x0112
    CLASS_INSTANCE_CONFLICT = 0x0119
    REFERENCED_SOP_CLASS_NOT_SUPPORTED = 0x0122
    DUPLICATE_TRANSACTION_UID = 0x0131
    RESOURCE_LIMITATION = 0x0213


class Remedy(StrEnum):
    """What the node does about an instance that a peer does not commit."""

    SEND_AGAIN = "send again"
    ASK_AGAIN = "ask again"
    NEVER = "never"


REMEDIES: Mapping[int, Remedy] = {
    FailureReason.PROCESSING_FAILURE: Remedy.SEND_AGAIN,
    FailureReason.NO_SUCH_OBJECT_INSTANCE: Remedy.SEND_AGAIN,
    FailureReason.RESOURCE_LIMITATION: Remedy.SEND_AGAIN,
    FailureReason.DUPLICATE_TRANSACTION_UID: Remedy.ASK_AGAIN,
    FailureReason.CLASS_INSTANCE_CONFLICT: Remedy.NEVER,
    FailureReason.REFERENCED_SOP_CLASS_NOT_SUPPORTED: Remedy.NEVER,
}


def remedy(failure_reason: int) -> Remedy:
    """Return what helps against a Failure Reason; one that the standard does not list may pass."""
    return REMEDIES.get(failure_reason, Remedy.SEND_AGAIN)


@dataclass(frozen=True, slots=True)
class Reference:
    """One instance that is asked about."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True)
class Request:
    """What an N-ACTION asks (PS3.4 Table J.3-1)."""

    transaction_uid: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What an N-EVENT-REPORT answers (PS3.4 Table J.3-2); `failed` gives each instance's Failure Reason."""

    transaction_uid: str
    committed: tuple[Reference, ...]
    failed: Mapping[Reference, int]

    @property
    def event_type_id(self) -> int:
        """Return the Event Type ID that goes with it."""
        return SOME_FAILED if self.failed else ALL_COMMITTED


class Malformed(Exception):
    """The data set of a request or report is not what Annex J says; `tag` is the element that is wrong."""

    def __init__(self, comment: str, tag: int) -> None:
        """Carry the Error Comment to answer and the element."""
        super().__init__(comment)
        self.tag = tag


def request_dataset(request: Request) -> Dataset:
    """Return the Action Information of a request."""
    dataset = Dataset()
    dataset.TransactionUID = request.transaction_uid
    dataset.ReferencedSOPSequence = [_item(reference) for reference in request.references]
    return dataset


def report_dataset(report: Report) -> Dataset:
    """Return the Event Information of a report; a sequence that would be empty is left out (Table J.3-2)."""
    dataset = Dataset()
    dataset.TransactionUID = report.transaction_uid
    if report.committed:
        dataset.ReferencedSOPSequence = [_item(reference) for reference in report.committed]
    if report.failed:
        dataset.FailedSOPSequence = [_item(reference, reason) for reference, reason in report.failed.items()]
    return dataset


def read_request(data: bytes, *, is_implicit: bool) -> Request:
    """Read the Action Information of an N-ACTION as it is encoded; raise Malformed where it names nothing."""
    values = _values(data, is_implicit)
    references = tuple(dict.fromkeys(reference for reference, _ in values.references("ReferencedSOPSequence")))
    if not references:
        raise Malformed("ReferencedSOPSequence is missing or empty", _TAGS["ReferencedSOPSequence"])
    return Request(values.transaction_uid, references)


def read_report(data: bytes, *, is_implicit: bool) -> Report:
    """Read the Event Information of an N-EVENT-REPORT; raise Malformed where it has no Transaction UID."""
    values = _values(data, is_implicit)
    failed = dict(values.references("FailedSOPSequence"))
    committed = dict.fromkeys(reference for reference, _ in values.references("ReferencedSOPSequence"))
    return Report(values.transaction_uid, tuple(each for each in committed if each not in failed), failed)


def judge(reference: Reference, sop_class_uid: str | None, *, is_intact: bool) -> FailureReason | None:
    """Return why an instance is not committed, or None where it is.

    `sop_class_uid` is that of the instance which the ledger knows by this SOP Instance UID, None where it knows
    none; `is_intact` says that its bytes were read again and are those that were received.
    """
    if sop_class_uid is None:
        return FailureReason.NO_SUCH_OBJECT_INSTANCE
    if sop_class_uid != reference.sop_class_uid:
        return FailureReason.CLASS_INSTANCE_CONFLICT
    return None if is_intact else FailureReason.PROCESSING_FAILURE


def report_on(request: Request, verdicts: Sequence[FailureReason | None]) -> Report:
    """Return the report on a request, given the verdict on each of its references."""
    pairs = list(zip(request.references, verdicts, strict=True))
    return Report(
        request.transaction_uid,
        tuple(reference for reference, verdict in pairs if verdict is None),
        {reference: int(verdict) for reference, verdict in pairs if verdict is not None},
    )


def _item(reference: Reference, failure_reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = reference.sop_class_uid
    item.ReferencedSOPInstanceUID = reference.sop_instance_uid
    if failure_reason is not None:
        item.FailureReason = failure_reason
    return item


@dataclass(frozen=True, slots=True)
class _Values:
    """The elements of a request or report, where they lie in its bytes: pydicom would make objects of every item."""

    data: memoryview
    is_implicit: bool
    places: Mapping[int, Place]

    @property
    def transaction_uid(self) -> str:
        tag = _TAGS["TransactionUID"]
        text = _text(self.data, self.places.get(tag))
        if not _is_uid(text):
            raise Malformed("TransactionUID is missing or malformed", tag)
        return text

    def references(self, keyword: str) -> Iterator[tuple[Reference, int]]:
        """Yield the instances that a sequence names, each with its Failure Reason."""
        tag = _TAGS[keyword]
        place = self.places.get(tag)
        is_implicit = self.is_implicit or (place is not None and place.vr == "UN")  # PS3.5 Section 6.2.2
        try:
            for number, item in enumerate(items(self.data, place, is_implicit) if place else ()):
                if number >= MAXIMUM_REFERENCES:
                    raise Malformed(f"More than {MAXIMUM_REFERENCES} instances in {keyword}", tag)
                found = scan(item, is_implicit, _OF_AN_ITEM)
                named = Reference(_text(item, found.get(_SOP_CLASS)), _text(item, found.get(_SOP_INSTANCE)))
                if not _is_uid(named.sop_class_uid) or not _is_uid(named.sop_instance_uid):
                    raise Malformed(f"An item of {keyword} names no instance by UIDs", tag)
                yield named, _reason(item, found.get(_FAILURE_REASON))
        except NotUnderstood as error:
            raise Malformed(f"{keyword} cannot be parsed", tag) from error


def _values(data: bytes, is_implicit: bool) -> _Values:
    view = memoryview(data)
    try:
        return _Values(view, is_implicit, scan(view, is_implicit, frozenset(_TAGS.values())))
    except NotUnderstood as error:
        raise Malformed("The data set cannot be parsed", _TAGS["TransactionUID"]) from error


def _text(view: Bytes, place: Place | None) -> str:
    if place is None or place.length > 2 * _LONGEST_UID:
        return ""
    return bytes(view[place.offset : place.offset + place.length]).decode("ascii", "replace").strip("\x00 ")


def _is_uid(text: str) -> bool:
    """Return whether it looks like a UID: what does not may say who a patient is, and would be kept and sent on."""
    return 0 < len(text) <= _LONGEST_UID and set(text) <= _OF_UIDS


def _reason(view: Bytes, place: Place | None) -> int:
    if place is None or place.length != 2 or place.vr not in ("", "US"):
        return FailureReason.PROCESSING_FAILURE
    return int.from_bytes(view[place.offset : place.offset + 2], "little")
