"""Which jobs are due, in which order, and which of them a message speaks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from sqlalchemy import bindparam, case, exists, func, or_, select, true, union_all, update

from dicom_node.ledger.database import Database
from dicom_node.ledger.moving import Job
from dicom_node.ledger.schema import job
from dicom_node.lifecycle import Courtesy, Kind, State
from dicom_node.routing import Priority


class Waiting(NamedTuple):
    """A job that waits for a worker; `rank` is how urgent it is by now, `priority` what its route says."""

    job_id: int
    priority: Priority
    attempts: int
    rank: int


# asked twice a second, by a node that has nothing to do as well: made once, and answered by an index at its first row
_NEEDS_ATTENTION = select(
    or_(
        exists().where((job.c.state == State.RUNNING) & (job.c.lease_until < bindparam("now"))),
        exists().where((job.c.state == State.COMMITTING) & (job.c.not_before <= bindparam("now"))),
        exists().where(
            (job.c.state == State.QUEUED)
            & (job.c.not_before <= bindparam("now"))
            & or_(job.c.hinted_at.is_(None), job.c.hinted_at < bindparam("hinted_before"))
        ),
    )
)


class Queue:
    """Queued jobs whose time has come: the most urgent first, and of these the longest due."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def needs_attention(self, *, now: float, hint_again: float) -> bool:
        """Return whether a lease has run out, a report is overdue, or a job is due without a recent message."""
        with self._database.reading() as connection:
            answer = connection.execute(_NEEDS_ATTENTION, {"now": now, "hinted_before": now - hint_again})
            return bool(answer.scalar())

    def due(self, kind: Kind, *, courtesy: Courtesy, now: float, hint_again: float, limit: int) -> list[int]:
        """Return up to `limit` jobs of a kind that no recent message speaks for."""
        stale = or_(job.c.hinted_at.is_(None), job.c.hinted_at < now - hint_again)
        return [found.job_id for found in self._first(kind, courtesy, now, limit=limit, only=stale)]

    def hinted(self, numbers: Iterable[int], *, now: float) -> None:
        """Note that a message was sent for each of these jobs."""
        with self._database.writing() as connection:
            connection.execute(update(job).where(job.c.job_id.in_(list(numbers))).values(hinted_at=now))

    def ahead_of(self, job_id: int, *, courtesy: Courtesy, now: float) -> int | None:
        """Return the first job of those that overtake a due one: of its kind, and more urgent; None where none does."""
        query = select(job.c.kind, _rank(courtesy, now)).where((job.c.job_id == job_id) & _is_due(now))
        with self._database.reading() as connection:
            this = connection.execute(query).one_or_none()
        first = self._first(this.kind, courtesy, now, only=true()) if this is not None else []
        return first[0].job_id if first and this is not None and first[0].rank < this.rank else None

    def waiting(self, kind: Kind, *, courtesy: Courtesy, since: float, now: float) -> Waiting | None:
        """Return the first job of a kind that no free worker has taken since `since`."""
        announced = func.coalesce(job.c.hinted_at, job.c.not_before)
        found = self._first(kind, courtesy, now, only=announced <= since)
        return found[0] if found else None

    def alike(self, held: Job, *, now: float) -> int | None:
        """Return the first job of those that are for the same model, to the digest, and were never tried before."""
        model = held.key.rpartition("/")[2]
        query = select(job.c.job_id).where(_is_due(now) & (job.c.kind == held.kind) & (job.c.attempts == 0))
        query = query.where((job.c.model == held.model) & job.c.key.endswith(f"/{model}", autoescape=True))
        with self._database.reading() as connection:
            ordered = query.order_by(job.c.priority, job.c.not_before, job.c.job_id)
            return connection.execute(ordered.limit(1)).scalar()

    def _first(self, kind: Kind, courtesy: Courtesy, now: float, *, only: Any, limit: int = 1) -> list[Waiting]:
        """Return the first of each priority, and of these the first: a long queue is not sorted to find its head."""
        columns = (job.c.job_id, job.c.priority, job.c.attempts, job.c.not_before, _rank(courtesy, now))
        wanted = select(*columns).where(_is_due(now) & (job.c.kind == kind) & only)
        heads = [
            wanted.where(job.c.priority == priority.value).order_by(job.c.not_before, job.c.job_id).limit(limit)
            for priority in Priority
        ]
        all_of_them = union_all(*(select(head.subquery()) for head in heads)).subquery()
        ordered = select(all_of_them).order_by(all_of_them.c.rank, all_of_them.c.not_before, all_of_them.c.job_id)
        with self._database.reading() as connection:
            rows = connection.execute(ordered.limit(limit)).all()
            return [Waiting(row.job_id, Priority(row.priority), row.attempts, row.rank) for row in rows]


def _is_due(now: float) -> Any:
    return (job.c.state == State.QUEUED) & (job.c.not_before <= now)


def _rank(courtesy: Courtesy, now: float) -> Any:
    """Return how urgent a job is: as its route says; one that has given way for long stands among the normal ones."""
    waited = (job.c.wanted_since < now - courtesy.seconds) & (job.c.priority > Priority.NORMAL.value)
    return case((waited, Priority.NORMAL.value), else_=job.c.priority).label("rank")
