"""The append-only record of what happened, written in the transaction that makes it happen."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection

from dicom_node.ledger.schema import event


class Subject(NamedTuple):
    """What an event is about."""

    study_instance_uid: str | None = None
    series_instance_uid: str | None = None


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
    connection.execute(event.insert().values(at=now, name=name, **subject._asdict(), job_id=job_id, fields=fields))
