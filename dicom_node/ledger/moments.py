"""Moments of the ledger that have yet to come, when the clock of the machine has been set back."""

from __future__ import annotations

from sqlalchemy import select, update

from dicom_node.ledger.database import Database
from dicom_node.ledger.journal import write_event
from dicom_node.ledger.schema import commitment_request, event, job, series
from dicom_node.lifecycle import State


class Moments:
    """What waits for a moment that a clock set back has moved far away."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def latest(self) -> float:
        """Return when the last event was; 0 where there is none."""
        with self._database.reading() as connection:
            return connection.execute(select(event.c.at).order_by(event.c.event_id.desc()).limit(1)).scalar() or 0.0

    def clock_was_set_back(self, *, seconds: float, lease: float, ask_again_after: float, now: float) -> None:
        """Bring what lies further ahead than it can to where it would be; a pause that is cut short does no harm."""
        waits = (job.c.state == State.QUEUED) & (job.c.not_before > now)
        hinted = (job.c.state == State.QUEUED) & (job.c.hinted_at > now)
        leased = (job.c.state == State.RUNNING) & (job.c.lease_until > now + lease)
        asked = (job.c.state == State.COMMITTING) & (job.c.not_before > now + ask_again_after)
        is_open = (series.c.complete_revision < series.c.revision) & (series.c.last_activity > now)
        due = commitment_request.c.ended_at.is_(None) & (commitment_request.c.not_before > now)
        with self._database.writing() as connection:
            connection.execute(update(series).where(is_open).values(last_activity=now))
            connection.execute(update(job).where(waits).values(not_before=now))
            connection.execute(update(job).where(hinted).values(hinted_at=None))
            connection.execute(update(job).where(leased).values(lease_until=now + lease))
            connection.execute(update(job).where(asked).values(not_before=now + ask_again_after))
            connection.execute(update(commitment_request).where(due).values(not_before=now))
            write_event(connection, "clock.set_back", now, seconds=round(seconds, 1))
