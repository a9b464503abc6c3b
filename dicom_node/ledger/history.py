"""What people and programs ask the ledger: what is going on, and what happened to one study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import func, or_, select

from dicom_node.ledger.database import Database
from dicom_node.ledger.journal import Note, Subject, write_events
from dicom_node.ledger.schema import event, job, result, series

Row = dict[str, Any]


class History:
    """Questions that change nothing, and the one way to note what has no other table."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def note(self, name: str, *, now: float, subject: Subject = Subject(), **fields: Any) -> None:
        """Append an event of its own, such as a refused presentation context."""
        self.note_all([Note(name, now, subject, fields)])

    def note_all(self, notes: Sequence[Note]) -> None:
        """Append events, all of them or, where one is refused, none."""
        if notes:
            with self._database.writing() as connection:
                write_events(connection, notes)

    def counts(self) -> Row:
        """Return how many instances, series and bytes there are, and how many jobs in each state by kind."""
        # the series know how much they are: of instances there may be millions
        received, size = (func.coalesce(func.sum(column), 0) for column in (series.c.received, series.c.bytes))
        with self._database.reading() as connection:
            counted = connection.execute(select(received, size, func.count()).select_from(series)).one()
            states = connection.execute(select(job.c.state, job.c.kind, func.count()).group_by(job.c.state, job.c.kind))
            jobs: dict[str, dict[str, int]] = {}
            for state, kind, of_kind in states:
                jobs.setdefault(kind, {})[state] = of_kind
        return {"instances": int(counted[0]), "bytes": int(counted[1]), "series": int(counted[2]), "jobs": jobs}

    def recent_series(self, *, limit: int) -> list[Row]:
        """Return the series with the latest activity."""
        return self._rows(select(series).order_by(series.c.last_activity.desc()).limit(limit))

    def recent_jobs(self, *, limit: int) -> list[Row]:
        """Return jobs with their study, those still to do before those that ended, the newest first."""
        query = select(job, series.c.study_instance_uid).join_from(job, series).order_by(job.c.job_id.desc())
        to_do = self._rows(query.where(job.c.ended_at.is_(None)).limit(limit))
        return to_do + self._rows(query.where(job.c.ended_at.isnot(None)).limit(limit - len(to_do)))

    def jobs_of(self, uid: str) -> list[Row]:
        """Return every job of a study or series, in the order they were made."""
        query = select(job, series.c.study_instance_uid).join_from(job, series)
        return self._rows(query.where(_about(series, uid)).order_by(job.c.job_id))

    def family_of(self, job_id: int) -> list[Row]:
        """Return a job and the deliveries of its results, in the order they were made."""
        query = select(job, series.c.study_instance_uid).join_from(job, series)
        return self._rows(query.where(or_(job.c.job_id == job_id, job.c.parent_id == job_id)).order_by(job.c.job_id))

    def series_of(self, uid: str) -> list[Row]:
        """Return the series of a study, or the one series."""
        return self._rows(select(series).where(_about(series, uid)))

    def results_of(self, uid: str) -> list[Row]:
        """Return every result object of a study or a series, with the revision it is for."""
        theirs = select(job.c.job_id).join_from(job, series).where(_about(series, uid))
        return self._rows(_select_results().where(result.c.job_id.in_(theirs)))

    def results(self, *, limit: int) -> list[Row]:
        """Return result objects in the order they were made."""
        return self._rows(_select_results().limit(limit))

    def events_of(self, uid: str) -> list[Row]:
        """Return what happened to a study or a series, in order, without the lines of the audit trail."""
        query = select(event).where(event.c.name.not_like("audit.%")).order_by(event.c.event_id)
        studies = {row["study_instance_uid"] for row in self.series_of(uid)}
        if studies:  # events are found by their study
            query = query.where(event.c.study_instance_uid.in_(studies))
        return self._rows(query.where(_about(event, uid)))

    def events_of_job(self, job_id: int) -> list[Row]:
        """Return what happened to one job, in order."""
        return self._rows(select(event).where(event.c.job_id == job_id).order_by(event.c.event_id))

    def recent_events(self, *, limit: int) -> list[Row]:
        """Return the latest events, in order."""
        return self._rows(select(event).order_by(event.c.event_id.desc()).limit(limit))[::-1]

    def audit(self, *, limit: int) -> list[Row]:
        """Return the latest lines of the audit trail, in order."""
        query = select(event).where(event.c.name.like("audit.%"))
        return self._rows(query.order_by(event.c.event_id.desc()).limit(limit))[::-1]

    def latest_event_id(self) -> int:
        """Return the number of the last event; 0 where there is none."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.coalesce(func.max(event.c.event_id), 0))).scalar_one())

    def events_after(self, event_id: int, *, limit: int = 200) -> list[Row]:
        """Return the events that came after number `event_id`, in order."""
        return self._rows(select(event).where(event.c.event_id > event_id).order_by(event.c.event_id).limit(limit))

    def _rows(self, query: Any) -> list[Row]:
        with self._database.reading() as connection:
            return [_plain(row) for row in connection.execute(query).mappings()]


def _select_results() -> Any:
    query = select(result, job.c.revision, job.c.model).join_from(result, job)
    return query.order_by(result.c.job_id, result.c.kind)


def _about(table: Any, uid: str) -> Any:
    return or_(table.c.study_instance_uid == uid, table.c.series_instance_uid == uid)


def _plain(row: Mapping[Any, Any]) -> Row:
    return {str(key): value for key, value in row.items()}
