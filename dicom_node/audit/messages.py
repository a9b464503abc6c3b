"""Audit messages as PS3.15 A.5 words them: what happened, who took part, what it was about; and their XML."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from ipaddress import ip_address
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from dicom_node.entities import AssociationIdentity, Header
from dicom_node.findings import Code


class Indicator(IntEnum):
    """EventOutcomeIndicator."""

    SUCCESS = 0
    MINOR = 4
    SERIOUS = 8
    MAJOR = 12


class Action(StrEnum):
    """EventActionCode."""

    CREATE = "C"
    READ = "R"
    DELETE = "D"
    EXECUTE = "E"


def _dcm(value: str, meaning: str) -> Code:
    return Code(value, "DCM", meaning)


APPLICATION_ACTIVITY = _dcm("110100", "Application Activity")
AUDIT_LOG_USED = _dcm("110101", "Audit Log Used")
BEGIN_TRANSFERRING = _dcm("110102", "Begin Transferring DICOM Instances")
INSTANCES_TRANSFERRED = _dcm("110104", "DICOM Instances Transferred")
STUDY_DELETED = _dcm("110105", "DICOM Study Deleted")
SECURITY_ALERT = _dcm("110113", "Security Alert")
USER_AUTHENTICATION = _dcm("110114", "User Authentication")

START = _dcm("110120", "Application Start")
STOP = _dcm("110121", "Application Stop")
LOGIN = _dcm("110122", "Login")
NODE_AUTHENTICATION = _dcm("110126", "Node Authentication")
SECURITY_CONFIGURATION = _dcm("110129", "Security Configuration")
RECORDING_STOPPED = _dcm("110133", "Audit Recording Stopped")
RECORDING_STARTED = _dcm("110134", "Audit Recording Started")

APPLICATION = _dcm("110150", "Application")
DESTINATION = _dcm("110152", "Destination Role ID")
SOURCE_ROLE = _dcm("110153", "Source Role ID")

_STUDY_INSTANCE_UID = _dcm("110180", "Study Instance UID")
_NODE_ID = _dcm("110182", "Node ID")
_PATIENT_NUMBER = Code("2", "RFC-3881", "Patient Number")
_URI = Code("12", "RFC-3881", "URI")

EVENTS: tuple[tuple[Code, str], ...] = (
    (APPLICATION_ACTIVITY, "the node starts (110120) or stops (110121)"),
    (AUDIT_LOG_USED, "`dicom-node audit` is called"),
    (BEGIN_TRANSFERRING, "a peer has accepted the association of a delivery"),
    (
        INSTANCES_TRANSFERRED,
        "an association that stored instances has ended, one message a study and outcome; a delivery has ended, "
        "one message for what was stored and one for what was not; the node died while it received",
    ),
    (STUDY_DELETED, "retention deletes a study"),
    (
        SECURITY_ALERT,
        "an association is rejected or a TLS handshake fails (110126); a certificate was read again (110129); "
        "the local spool is full (110133), and has room again (110134)",
    ),
    (USER_AUTHENTICATION, "a peer with `user` in its table is admitted, or has named another user (110122)"),
)
"""Which events the node reports, and when; CONFORMANCE.md shows it."""


@dataclass(frozen=True, slots=True)
class Participant:
    """An ActiveParticipant: a process, known by its AE title, or a user."""

    user_id: str
    is_requestor: bool
    role: Code | None = None
    ae_title: str = ""
    access_point: str = ""  # IP address or machine name


@dataclass(frozen=True, slots=True)
class Subject:
    """A ParticipantObjectIdentification."""

    object_id: str
    id_type: Code
    name: str
    type_code: int  # 1 person, 2 system object
    role: int  # ParticipantObjectTypeCodeRole
    life_cycle: int | None = None
    details: tuple[tuple[str, str], ...] = ()
    sop_classes: Mapping[str, int] = field(default_factory=dict)  # SOP Class UID: number of instances


@dataclass(frozen=True, slots=True)
class Patient:
    """Who a study is of; only in messages to a collector whose operator asked for it."""

    patient_id: str
    name: str


@dataclass(frozen=True, slots=True)
class Source:
    """The AuditSourceIdentification."""

    source_id: str
    site: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One audit message; `at` is in seconds since 1970."""

    event: Code
    action: Action
    at: float
    participants: tuple[Participant, ...]
    indicator: Indicator = Indicator.SUCCESS
    types: tuple[Code, ...] = ()
    subjects: tuple[Subject, ...] = ()
    description: str = ""

    @property
    def name(self) -> str:
        """Return what the ledger calls it: `audit.dicom_instances_transferred`."""
        return "audit." + self.event.meaning.lower().replace(" ", "_")


# -- what happened to what --------------------------------------------------------------------------------


class Transfers:
    """What one association has brought: instances by study, by what became of them, by SOP class."""

    _KINDS: Mapping[str, tuple[Action, Indicator, str]] = {
        "stored": (Action.CREATE, Indicator.SUCCESS, ""),
        "duplicate": (Action.READ, Indicator.SUCCESS, "held already"),
        "quarantined": (Action.CREATE, Indicator.MINOR, "other bytes under known UIDs: set aside"),
    }

    def __init__(self) -> None:
        """Begin with nothing."""
        self._counts: dict[tuple[str, str], Counter[str]] = {}

    def add(self, header: Header, outcome: str) -> None:
        """Count one acknowledged instance; `outcome` is what `intake` says of it."""
        self._counts.setdefault((header.study_instance_uid, outcome), Counter())[header.sop_class_uid] += 1

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, int], Action, Indicator, str]]:
        """Yield study, instances by SOP class, action, indicator, and a word about it."""
        for (study_instance_uid, outcome), counts in self._counts.items():
            yield study_instance_uid, counts, *self._KINDS[outcome]


class Visit(NamedTuple):
    """An association that has ended."""

    association: AssociationIdentity
    transfers: Transfers
    is_released: bool


def node(process: str, ae_title: str, machine: str, *, role: Code | None = None, asks: bool = False) -> Participant:
    """Return the node's own process as a participant."""
    return Participant(process, asks, role, ae_title, machine)


def peer(ae_title: str, address: str, *, role: Code | None = None, asks: bool = False) -> Participant:
    """Return another application entity as a participant."""
    return Participant(ae_title or address, asks, role, ae_title, address)


def study(study_instance_uid: str, sop_classes: Mapping[str, int] | None = None) -> Subject:
    """Return a study; its name is its UID, for what a person calls it may name the patient."""
    return Subject(study_instance_uid, _STUDY_INSTANCE_UID, study_instance_uid, 2, 3, sop_classes=sop_classes or {})


def transferred(
    event: Code,
    at: float,
    source: Participant,
    destination: Participant,
    studies: Sequence[Subject],
    patient: Patient | None,
    *,
    action: Action,
    indicator: Indicator = Indicator.SUCCESS,
    description: str = "",
) -> Message:
    """Return a Begin Transferring or a Transferred message (PS3.15 A.5.3.3, A.5.3.7)."""
    return Message(
        event,
        action,
        at,
        (source, destination),
        indicator,
        subjects=(*studies, *_patients(patient)),
        description=description,
    )


def activity(at: float, application: Participant, *, is_start: bool) -> Message:
    """Return an Application Activity message (PS3.15 A.5.3.1)."""
    return Message(APPLICATION_ACTIVITY, Action.EXECUTE, at, (application,), types=(START if is_start else STOP,))


def log_used(at: float, user: Participant, uri: str) -> Message:
    """Return an Audit Log Used message (PS3.15 A.5.3.2)."""
    return Message(
        AUDIT_LOG_USED, Action.READ, at, (user,), subjects=(Subject(uri, _URI, "Security Audit Log", 2, 13),)
    )


def deleted(at: float, process: Participant, subject: Subject, patient: Patient | None, description: str) -> Message:
    """Return a Study Deleted message (PS3.15 A.5.3.8)."""
    subjects = (subject, *_patients(patient))
    return Message(STUDY_DELETED, Action.DELETE, at, (process,), subjects=subjects, description=description)


def alert(
    at: float,
    kind: Code,
    reporter: Participant,
    words: str,
    *,
    indicator: Indicator,
    performer: Participant | None = None,
    node_id: str = "",
    uri: str = "",
) -> Message:
    """Return a Security Alert (PS3.15 A.5.3.11) about another node, by its address, or about a file."""
    details = (("Alert Description", words),)
    subjects = (
        *((Subject(node_id, _NODE_ID, node_id, 2, 13, details=details),) if node_id else ()),
        *((Subject(uri, _URI, uri, 2, 13, details=details),) if uri else ()),
    )
    who = (reporter, performer) if performer else (reporter,)
    return Message(SECURITY_ALERT, Action.EXECUTE, at, who, indicator, (kind,), subjects, words)


def login(
    at: float, user: str, address: str, authenticator: Participant, *, is_admitted: bool, description: str = ""
) -> Message:
    """Return a User Authentication message (PS3.15 A.5.3.12)."""
    who = (Participant(user, True, access_point=address), authenticator)
    indicator = Indicator.SUCCESS if is_admitted else Indicator.MINOR
    return Message(USER_AUTHENTICATION, Action.EXECUTE, at, who, indicator, (LOGIN,), description=description)


def _patients(patient: Patient | None) -> tuple[Subject, ...]:
    if patient is None:
        return ()
    return (Subject(patient.patient_id, _PATIENT_NUMBER, patient.name or patient.patient_id, 1, 1),)


# -- XML --------------------------------------------------------------------------------------------------

_APPLICATION_SERVER = "4"  # AuditSourceTypeCode
_DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>'
_NOT_PLAIN = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def encode(message: Message, source: Source) -> bytes:
    """Return a message as one line of XML in UTF-8, by the schema of PS3.15 A.5.1.1."""
    root = Element("AuditMessage")
    event = _add(
        root,
        "EventIdentification",
        EventActionCode=message.action.value,
        EventDateTime=datetime.fromtimestamp(message.at, UTC).isoformat(timespec="milliseconds"),
        EventOutcomeIndicator=str(int(message.indicator)),
    )
    _coded(event, "EventID", message.event)
    for kind in message.types:
        _coded(event, "EventTypeCode", kind)
    if message.description:
        _add(event, "EventOutcomeDescription").text = _plain(message.description)
    for participant in message.participants:
        _participant(root, participant)
    origin = _add(
        root, "AuditSourceIdentification", AuditEnterpriseSiteID=source.site or None, AuditSourceID=source.source_id
    )
    _add(origin, "AuditSourceTypeCode", **{"csd-code": _APPLICATION_SERVER})
    for subject in message.subjects:
        _subject(root, subject)
    made: bytes = tostring(root, encoding="utf-8")
    return _DECLARATION + made


def _participant(root: Element, participant: Participant) -> None:
    point = participant.access_point
    element = _add(
        root,
        "ActiveParticipant",
        UserID=participant.user_id,
        AlternativeUserID=f"AETITLES={participant.ae_title}" if participant.ae_title else None,
        UserIsRequestor="true" if participant.is_requestor else "false",
        NetworkAccessPointID=point or None,
        NetworkAccessPointTypeCode=("2" if _is_address(point) else "1") if point else None,
    )
    if participant.role:
        _coded(element, "RoleIDCode", participant.role)


def _subject(root: Element, subject: Subject) -> None:
    element = _add(
        root,
        "ParticipantObjectIdentification",
        ParticipantObjectID=subject.object_id,
        ParticipantObjectTypeCode=str(subject.type_code),
        ParticipantObjectTypeCodeRole=str(subject.role),
        ParticipantObjectDataLifeCycle=str(subject.life_cycle) if subject.life_cycle else None,
    )
    _coded(element, "ParticipantObjectIDTypeCode", subject.id_type)
    _add(element, "ParticipantObjectName").text = _plain(subject.name)
    for kind, value in subject.details:
        encoded = base64.b64encode(value.encode(errors="replace")).decode()
        _add(element, "ParticipantObjectDetail", type=kind, value=encoded)
    if subject.sop_classes:
        description = _add(element, "ParticipantObjectDescription")
        for uid, number in sorted(subject.sop_classes.items()):
            _add(description, "SOPClass", UID=uid, NumberOfInstances=str(number))


def _coded(parent: Element, name: str, code: Code) -> None:
    _add(parent, name, **{"csd-code": code.value, "codeSystemName": code.scheme, "originalText": code.meaning})


def _add(parent: Element, name: str, **attributes: str | None) -> Element:
    """Append an element; an attribute that is None is left out."""
    return SubElement(parent, name, {key: _plain(value) for key, value in attributes.items() if value is not None})


def _plain(text: str) -> str:
    """Return text without what XML 1.0 cannot hold, and without ends of lines."""
    return _NOT_PLAIN.sub("\N{REPLACEMENT CHARACTER}", text)


def _is_address(text: str) -> bool:
    try:
        ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True
