"""What may leave and how it leaves: studies with all their rows, and the events that nobody will ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, case, delete, func, or_, select

from dicom_node.ledger.database import Database
from dicom_node.ledger.journal import Subject, write_event
from dicom_node.ledger.schema import (
    commitment,
    commitment_request,
    deletion,
    event,
    holding,
    instance,
    job,
    result,
    series,
)
from dicom_node.lifecycle import Kind, State
from dicom_node.retention import Ground, Study, Work

_COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Departed:
    """A study that the ledger does not know any more; its files may still be there."""

    study_instance_uid: str
    ground: Ground
    sop_classes: Mapping[str, int]  # how many instances and results of each SOP Class UID


class Departures:
    """Questions about what may leave, and the one way to leave."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def candidates(self, *, silent_since: float) -> list[str]:
        """Return the studies that nothing has arrived for since then, the longest silent first."""
        latest = func.max(series.c.last_activity)
        query = select(series.c.study_instance_uid).group_by(series.c.study_instance_uid)
        query = query.having(latest <= silent_since).order_by(latest, series.c.study_instance_uid)
        with self._database.reading() as connection:
            return list(connection.execute(query).scalars())

    def studies(self, uids: Sequence[str]) -> list[Study]:
        """Return all that decides about these studies."""
        with self._database.reading() as connection:
            return _studies(connection, uids)

    def delete(
        self,
        study_instance_uid: str,
        deletion_id: str,
        *,
        node_id: str,
        judge: Callable[[Study], Ground | None],
        set_aside: Callable[[Sequence[str], Sequence[str]], None],
        now: float,
    ) -> Departed | None:
        """Delete every row of a study and record that it was, in one transaction; None where `judge` says no now.

        `set_aside` is called with the paths of instances and of results, just before the commit: where it raises,
        nothing is deleted. Afterwards `departed` says of its `deletion_id` whether the rows are gone.
        """
        uid = study_instance_uid
        with self._database.writing() as connection:
            mine = select(series.c.series_instance_uid).where(series.c.study_instance_uid == uid)
            jobs = select(job.c.job_id).where(job.c.series_instance_uid.in_(mine))
            # series before jobs, as everywhere; what arrives for them waits, and then finds them gone
            connection.execute(mine.order_by(series.c.series_instance_uid).with_for_update()).all()
            connection.execute(jobs.order_by(job.c.job_id).with_for_update()).all()
            found = _studies(connection, [uid])
            ground = judge(found[0]) if found else None
            if ground is None:
                return None
            instances = connection.execute(_files(instance).where(instance.c.series_instance_uid.in_(mine))).all()
            results = connection.execute(_files(result).where(result.c.job_id.in_(jobs))).all()
            files = [*instances, *results]
            departed = Departed(uid, ground, Counter(row.sop_class_uid for row in files))
            fields = {"instances": len(instances), "results": len(results), "bytes": sum(row.size for row in files)}
            _delete_rows(connection, mine, jobs)
            values = {name: getattr(departed, name) for name in Departed.__slots__}
            connection.execute(deletion.insert().values(deletion_id=deletion_id, node_id=node_id, **values))
            write_event(connection, "study.deleted", now, Subject(uid), ground=ground, **fields)
            set_aside([row.path for row in instances], [row.path for row in results])
            return departed

    def departed(self, deletion_id: str) -> Departed | None:
        """Return the study of a deletion whose rows are gone and whose files have to follow; None where they stay."""
        query = select(*(deletion.c[name] for name in Departed.__slots__))
        with self._database.reading() as connection:
            row = connection.execute(query.where(deletion.c.deletion_id == deletion_id)).one_or_none()
        return None if row is None else Departed(row.study_instance_uid, Ground(row.ground), row.sop_classes)

    def files_are_gone(self, *, node_id: str) -> None:
        """Forget this node's deletions: no file of theirs is left."""
        with self._database.reading() as connection:
            if connection.execute(select(deletion.c.deletion_id).where(deletion.c.node_id == node_id)).first() is None:
                return
        with self._database.writing() as connection:
            connection.execute(delete(deletion).where(deletion.c.node_id == node_id))

    def forget_events(self, *, before: float, after: int, limit: int) -> int | None:
        """Delete old events of studies that are gone and of none, among `limit` that follow event number `after`.

        Returns the number of the last event that was looked at, None where no older one is left.
        """
        window = select(event.c.event_id, event.c.at).where(event.c.event_id > after)
        with self._database.reading() as connection:
            rows = connection.execute(window.order_by(event.c.event_id).limit(limit)).all()
        if not rows or rows[0].at >= before:
            return None
        present = select(series.c.study_instance_uid).where(series.c.study_instance_uid == event.c.study_instance_uid)
        # the last event stays, whatever its age: SQLite would give its number again
        latest = select(func.max(event.c.event_id)).scalar_subquery()
        window_only = event.c.event_id.between(rows[0].event_id, rows[-1].event_id) & (event.c.event_id < latest)
        nobody_asks = or_(event.c.study_instance_uid.is_(None), ~present.exists())
        with self._database.writing() as connection:
            connection.execute(delete(event).where(window_only & (event.c.at < before) & nobody_asks))
        return int(rows[-1].event_id)

    def forget_requests(self, *, before: float) -> int:
        """Delete requests for storage commitment that ended before then; what was promised stays promised."""
        with self._database.writing() as connection:
            ended = commitment_request.c.ended_at < before
            return connection.execute(delete(commitment_request).where(ended)).rowcount


def _files(table: Table) -> Any:
    return select(table.c.sop_class_uid, table.c.path, table.c.size)


def _delete_rows(connection: Connection, mine: Any, jobs: Any) -> None:
    for table, column, of in (
        (commitment, commitment.c.job_id, jobs),
        (result, result.c.job_id, jobs),
        (job, job.c.series_instance_uid, mine),
        (holding, holding.c.series_instance_uid, mine),
        (instance, instance.c.series_instance_uid, mine),
        (series, series.c.series_instance_uid, mine),
    ):
        connection.execute(delete(table).where(column.in_(of)))


def _studies(connection: Connection, uids: Sequence[str]) -> list[Study]:
    about = series.c.study_instance_uid.in_(uids)
    incomplete = func.sum(case((series.c.complete_revision < series.c.revision, 1), else_=0))
    query = select(
        series.c.study_instance_uid,
        func.max(series.c.last_activity).label("last_activity"),
        incomplete.label("incomplete"),
        func.max(series.c.promised_at).label("promised_at"),
    ).where(about)
    rows = connection.execute(query.group_by(series.c.study_instance_uid)).all()
    held = select(series.c.study_instance_uid).join_from(
        holding, series, holding.c.series_instance_uid == series.c.series_instance_uid
    )
    held_studies = set(connection.execute(held.where(about)).scalars())
    work, ended = _work(connection, about)
    return [
        Study(
            row.study_instance_uid,
            max([row.last_activity, *ended.get(row.study_instance_uid, ())]),
            is_complete=not row.incomplete,
            is_held=row.study_instance_uid in held_studies,
            work=tuple(work.get(row.study_instance_uid, ())),
            promised_at=row.promised_at,
        )
        for row in rows
    ]


def _work(connection: Connection, about: Any) -> tuple[dict[str, list[Work]], dict[str, list[float]]]:
    """Return the jobs of studies, and when each ended or was wanted last."""
    asked = func.count(commitment.c.sop_instance_uid)
    committed = func.sum(case((commitment.c.state == _COMMITTED, 1), else_=0))
    query = (
        select(
            series.c.study_instance_uid,
            job.c.kind,
            job.c.state,
            func.coalesce(job.c.ended_at, job.c.wanted_since).label("at"),
            asked.label("asked"),
            committed.label("committed"),
        )
        .select_from(series.join(job).outerjoin(commitment))
        .where(about)
        .group_by(series.c.study_instance_uid, job.c.job_id)
    )
    work: dict[str, list[Work]] = {}
    ended: dict[str, list[float]] = {}
    for row in connection.execute(query):
        one = Work(Kind(row.kind), State(row.state), int(row.asked), int(row.committed))
        work.setdefault(row.study_instance_uid, []).append(one)
        ended.setdefault(row.study_instance_uid, []).append(row.at)
    return work, ended
