"""The append-only record of what happened, written in the transaction that makes it happen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection

from dicom_node.ledger.schema import event

_APPEND = event.insert()


class Subject(NamedTuple):
    """What an event is about."""

    study_instance_uid: str | None = None
    series_instance_uid: str | None = None


class Note(NamedTuple):
    """An event, to be written; `fields` are its numbers and reasons, never a patient's identity."""

    name: str
    at: float
    subject: Subject
    fields: Mapping[str, Any]
    job_id: int | None = None


def write_event(
    connection: Connection,
    name: str,
    now: float,
    subject: Subject = Subject(),
    *,
    job_id: int | None = None,
    **fields: Any,
) -> None:
    """Append one event; `fields` are its numbers and reasons, never a patient's identity."""
    write_events(connection, [Note(name, now, subject, fields, job_id)])


def write_events(connection: Connection, notes: Sequence[Note]) -> None:
    """Append events, in their order."""
    rows = [
        {"at": note.at, "name": note.name, **note.subject._asdict(), "job_id": note.job_id, "fields": note.fields}
        for note in notes
    ]
    connection.execute(_APPEND, rows)
