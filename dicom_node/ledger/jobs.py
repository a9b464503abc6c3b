"""Jobs: made when a series is complete, claimed by one worker at a time, moved only along the life cycle's table."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, func, select, update

from dicom_node.ledger.database import Database
from dicom_node.ledger.journal import Subject, write_event
from dicom_node.ledger.moving import (
    Job,
    LostLease,
    StoredResult,
    job_of,
    lock_owned,
    move,
    owned,
    read_job,
    select_jobs,
    tries,
)
from dicom_node.ledger.schema import commitment, event, holding, job, result, series
from dicom_node.lifecycle import (
    MISSING_INPUT,
    REQUEUEABLE,
    Happening,
    IllegalTransition,
    Kind,
    State,
    advance,
    pause_after_death,
)
from dicom_node.routing import Order
from dicom_node.services import RESULT_KIND_NAMES

# statements that every series needs when it is complete are made once
_IS_IT = series.c.series_instance_uid == bindparam("uid")
_DECLARE = (
    update(series)
    .where(
        _IS_IT,
        series.c.revision == bindparam("seen"),
        series.c.complete_revision < bindparam("seen"),
        series.c.last_activity == bindparam("silent_since"),
        ~exists().where(holding.c.series_instance_uid == series.c.series_instance_uid),
    )
    .values(complete_revision=bindparam("seen"))
)
_STUDY = select(series.c.study_instance_uid).where(_IS_IT)
_OLDER = (
    select(job.c.job_id)
    .where(
        job.c.series_instance_uid == bindparam("uid"),
        job.c.revision < bindparam("seen"),
        job.c.state.in_([State.QUEUED, State.FAILED]),
    )
    .with_for_update()
)
_LACKING = (
    select(job.c.job_id)
    .join_from(job, series)
    .where(
        job.c.state == State.NOT_APPLICABLE,
        job.c.reason == MISSING_INPUT,
        series.c.study_instance_uid == bindparam("uid"),
        series.c.revision == job.c.revision,
    )
    .order_by(job.c.job_id)
)


class Jobs:
    """Questions about jobs, and every way to move one."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    # -- made ---------------------------------------------------------------------------------------------

    def complete(
        self,
        series_instance_uid: str,
        *,
        revision: int,
        last_activity: float,
        reason: str,
        orders: Sequence[tuple[Order, str]],
        now: float,
    ) -> list[int] | None:
        """Declare a revision complete and make its jobs, one per `(order, model digest)`, in one transaction.

        Returns the new jobs' numbers, or None where the series moved on since it was looked at.
        """
        seen = {"uid": series_instance_uid, "seen": revision, "silent_since": last_activity}
        with self._database.writing() as connection:
            declared = connection.execute(_DECLARE, seen)
            if declared.rowcount == 0:
                return None
            subject = _subject(connection, series_instance_uid)
            silent = round(now - last_activity, 3)
            write_event(connection, "series.complete", now, subject, revision=revision, reason=reason, silent=silent)
            self._supersede(connection, series_instance_uid, revision, now)
            _revive(connection, subject.study_instance_uid, now)
            if not orders:
                write_event(connection, "series.unrouted", now, subject, revision=revision)
            made = [
                self._make_inference(connection, series_instance_uid, revision, order, digest, now)
                for order, digest in orders
            ]
            return [number for number in made if number is not None]

    def _make_inference(
        self, connection: Connection, series_uid: str, revision: int, order: Order, digest: str, now: float
    ) -> int | None:
        return self._make(
            connection,
            now,
            kind=Kind.INFER,
            key=f"infer/{series_uid}/{revision}/{order.model}@{digest[:16]}",
            series_instance_uid=series_uid,
            revision=revision,
            model=order.model,
            routes=list(order.routes),
            send_to=list(order.send_to),
            priority=order.priority,
        )

    def _make(self, connection: Connection, now: float, **values: Any) -> int | None:
        """Insert a queued job and its event; None where the key exists: the same work is one job."""
        statement = (
            self._database.insert(job)
            .values(state=State.QUEUED, attempts=0, progress=0.0, **values)
            .values(self._database.unused_number(job.c.job_id, event.c.job_id))
            .values(not_before=now, created_at=now, wanted_since=now)
            .on_conflict_do_nothing(index_elements=["key"])
            .returning(job.c.job_id)
        )
        number = connection.execute(statement).scalar()
        if number is not None:
            subject = _subject(connection, values["series_instance_uid"])
            fields = {name: values[name] for name in ("kind", "model", "peer", "revision") if name in values}
            write_event(connection, "job.queued", now, subject, job_id=number, **fields)
        return number

    def _supersede(self, connection: Connection, series_instance_uid: str, revision: int, now: float) -> None:
        """Cancel what is left to do for earlier revisions; a running job notices when it finishes."""
        for number in connection.execute(_OLDER, {"uid": series_instance_uid, "seen": revision}).scalars().all():
            move(connection, number, Happening.SUPERSEDED, now, reason="superseded", detail=f"by revision {revision}")

    # -- claimed ------------------------------------------------------------------------------------------

    def claim(self, job_id: int, *, worker: str, lease: float, now: float) -> Job | None:
        """Take a queued job for `lease` seconds; None where another has it or it is not due."""
        with self._database.writing() as connection:
            current = _lock_series_of(connection, job_id)
            taken = connection.execute(
                update(job)
                .where((job.c.job_id == job_id) & (job.c.state == State.QUEUED) & (job.c.not_before <= now))
                .values(
                    state=advance(State.QUEUED, Happening.CLAIMED),
                    attempts=job.c.attempts + 1,
                    worker=worker,
                    lease_token=uuid.uuid4().hex,
                    lease_until=now + lease,
                    started_at=now,
                    ended_at=None,
                    progress=0.0,
                )
            )
            if taken.rowcount == 0:
                return None
            claimed = read_job(connection, job_id)
            if claimed.kind is Kind.INFER and current != claimed.revision:
                move(
                    connection, job_id, Happening.SUPERSEDED, now, reason="superseded", detail=f"by revision {current}"
                )
                return None
            subject = Subject(claimed.study_instance_uid, claimed.series_instance_uid)
            write_event(connection, "job.claimed", now, subject, job_id=job_id, attempt=claimed.attempts, worker=worker)
            return claimed

    def renew(self, held: Job, *, lease: float, progress: float, now: float) -> None:
        """Prolong a lease and note the progress, 0..1; raise LostLease where the job is no longer ours."""
        with self._database.writing() as connection:
            renewed = connection.execute(
                update(job).where(owned(held)).values(lease_until=now + lease, progress=progress)
            )
            if renewed.rowcount == 0:
                raise LostLease

    def recover(self, *, maximum_deaths: int, now: float) -> int:
        """Put back every running job whose lease ran out, or fail it after too many deaths; return how many."""
        return self._abandon(job.c.lease_until < now, maximum_deaths, now)

    def abandon_worker(self, worker: str, *, maximum_deaths: int, now: float) -> int:
        """Put back what a worker held that is known to be dead, without waiting for its lease.

        `worker` is its name, or what all names of a dead node's workers begin with, up to their `#`.
        """
        several = job.c.worker.startswith(worker, autoescape=True)
        return self._abandon(several if worker.endswith("#") else job.c.worker == worker, maximum_deaths, now)

    def _abandon(self, condition: Any, maximum_deaths: int, now: float) -> int:
        with self._database.writing() as connection:
            query = select(job.c.job_id, job.c.kind, job.c.wanted_since)
            query = query.where((job.c.state == State.RUNNING) & condition).with_for_update()
            rows = connection.execute(query).all()
            for number, kind, since in rows:
                deaths = _times(connection, number, Happening.ABANDONED, since) + 1
                if deaths < maximum_deaths or kind == Kind.DELIVER:
                    later = now + pause_after_death(deaths)
                    move(connection, number, Happening.ABANDONED, now, reason="worker_died", not_before=later)
                else:
                    detail = f"its worker died {deaths} times"
                    move(connection, number, Happening.EXHAUSTED, now, reason="worker_died", detail=detail)
            return len(rows)

    # -- ended --------------------------------------------------------------------------------------------

    def ended(
        self,
        held: Job,
        happening: Happening,
        *,
        now: float,
        reason: str | None = None,
        detail: str | None = None,
        not_before: float | None = None,
        **fields: Any,
    ) -> None:
        """Record how an attempt ended, with `fields` for its event; raise LostLease where the job is not ours."""
        with self._database.writing() as connection:
            lock_owned(connection, held)
            move(connection, held.job_id, happening, now, reason=reason, detail=detail, not_before=not_before, **fields)

    def tries(self, held: Job) -> int:
        """Return how often it was tried in vain to reach whom a delivery is for, by this job or by another."""
        if held.peer is None:
            return held.attempts
        with self._database.reading() as connection:
            return max(held.attempts, tries(connection, held.peer))

    def yielded(self, held: Job, *, reason: str, now: float, interrupted: bool) -> None:
        """Put a job back that its worker had begun, without counting the attempt; raise LostLease where it is not ours.

        It keeps its place. `interrupted` says that it gave way to a more urgent one, which is bounded.
        """
        with self._database.writing() as connection:
            lock_owned(connection, held)
            move(connection, held.job_id, Happening.YIELDED, now, reason=reason, not_before=held.not_before)
            counted = {"attempts": job.c.attempts - 1, "yielded": job.c.yielded + int(interrupted), "progress": 0.0}
            connection.execute(update(job).where(job.c.job_id == held.job_id).values(**counted))

    def inferred(
        self,
        held: Job,
        results: Sequence[StoredResult],
        *,
        now: float,
        seconds: Mapping[str, float],
        began: Mapping[str, float] = {},
        notes: Sequence[str] = (),
    ) -> list[int]:
        """Record results, the deliveries they ask for and that the job is done, in one transaction.

        `seconds` is how long each stage took, `began` when it did, `notes` what of the series was left out.
        Where the series has moved on meanwhile, nothing but the cancellation is recorded: the job for the
        later revision will speak. Returns the deliveries' numbers.
        """
        with self._database.writing() as connection:
            current = _lock_series_of(connection, held.job_id)
            lock_owned(connection, held)
            if current != held.revision:
                detail = f"by revision {current}"
                move(connection, held.job_id, Happening.SUPERSEDED, now, reason="superseded", detail=detail)
                return []
            for made in results:
                connection.execute(
                    result.insert().values(job_id=held.job_id, created_at=now, **{n: getattr(made, n) for n in _RESULT})
                )
            fields: dict[str, Any] = {"results": len(results), "seconds": dict(seconds), "began": dict(began)}
            fields |= {"notes": list(notes)} if notes else {}
            move(connection, held.job_id, Happening.FINISHED, now, **fields)
            deliveries = [self._make_delivery(connection, held, peer, now) for peer in held.send_to if results]
            return [number for number in deliveries if number is not None]

    def _make_delivery(self, connection: Connection, held: Job, peer: str, now: float) -> int | None:
        return self._make(
            connection,
            now,
            kind=Kind.DELIVER,
            key=f"deliver/{held.job_id}/{peer}",
            series_instance_uid=held.series_instance_uid,
            revision=held.revision,
            model=held.model,
            routes=list(held.routes),
            send_to=[peer],
            priority=held.priority,
            parent_id=held.job_id,
            peer=peer,
        )

    def requeue(self, job_id: int, *, now: float) -> Job:
        """Queue an ended job again at the operator's wish; raise IllegalTransition where that makes no sense."""
        with self._database.writing() as connection:
            found = read_job(connection, job_id)
            if found.state not in REQUEUEABLE[found.kind]:
                raise IllegalTransition(f"job {job_id} is {found.state}: a {found.kind} job cannot be requeued then")
            move(connection, job_id, Happening.REQUEUED, now, not_before=now)
            connection.execute(delete(commitment).where(commitment.c.job_id == job_id))  # everything is sent again
            connection.execute(update(job).where(job.c.job_id == job_id).values(attempts=0, wanted_since=now))
            return read_job(connection, job_id)

    def withdraw(self, job_id: int, *, now: float) -> Job:
        """Cancel a job at the operator's wish; a worker that runs it stops between two windows of its model.

        Raises IllegalTransition where it has ended already.
        """
        with self._database.writing() as connection:
            move(connection, job_id, Happening.WITHDRAWN, now, reason="withdrawn", detail="by the operator")
            return read_job(connection, job_id)

    # -- asked --------------------------------------------------------------------------------------------

    def get(self, job_id: int) -> Job | None:
        """Return a job, or None."""
        with self._database.reading() as connection:
            found = connection.execute(select_jobs().where(job.c.job_id == job_id)).mappings().one_or_none()
            return None if found is None else job_of(found)

    def series_inferred(self, study_instance_uid: str, model: str) -> frozenset[str]:
        """Return the series of a study that were routed to a model."""
        query = select(job.c.series_instance_uid).join_from(job, series)
        query = query.where(
            (series.c.study_instance_uid == study_instance_uid) & (job.c.model == model) & (job.c.kind == Kind.INFER)
        )
        with self._database.reading() as connection:
            return frozenset(connection.execute(query).scalars())

    def results_of(self, job_id: int) -> list[StoredResult]:
        """Return the result objects of an inference, each after those that it refers to."""
        query = select(result).where(result.c.job_id == job_id).order_by(result.c.sop_instance_uid)
        with self._database.reading() as connection:
            stored = [_stored_result(row) for row in connection.execute(query).mappings()]
        return sorted(stored, key=lambda made: RESULT_KIND_NAMES.index(made.kind))

    def earlier_results(self, series_instance_uid: str, model: str, *, before_revision: int) -> list[StoredResult]:
        """Return the results of this model for the latest earlier revision of a series that has any."""
        earlier = (
            (job.c.series_instance_uid == series_instance_uid)
            & (job.c.model == model)
            & (job.c.revision < before_revision)
            & (job.c.kind == Kind.INFER)
        )
        joined = result.join(job)
        with self._database.reading() as connection:
            latest = connection.execute(select(func.max(job.c.revision)).select_from(joined).where(earlier)).scalar()
            query = select(result).select_from(joined).where(earlier & (job.c.revision == latest))
            return [_stored_result(row) for row in connection.execute(query).mappings()]


_RESULT = tuple(StoredResult.__slots__)


def _stored_result(row: Mapping[Any, Any]) -> StoredResult:
    return StoredResult(**{name: row[name] for name in _RESULT})


def _subject(connection: Connection, series_instance_uid: str) -> Subject:
    study_instance_uid = connection.execute(_STUDY, {"uid": series_instance_uid}).scalar_one()
    return Subject(study_instance_uid, series_instance_uid)


def _lock_series_of(connection: Connection, job_id: int) -> int | None:
    """Return the present revision of a job's series; nobody can raise it until the transaction ends.

    Every transaction that needs both locks the series before the job: two orders would be a deadlock.
    """
    query = select(series.c.revision).join_from(series, job).where(job.c.job_id == job_id)
    revision: int | None = connection.execute(query.with_for_update(of=series)).scalar()
    return revision


def _revive(connection: Connection, study_instance_uid: str | None, now: float) -> None:
    """Queue again the jobs of a study that lacked another series: a new one is there."""
    for number in connection.execute(_LACKING, {"uid": study_instance_uid}).scalars().all():
        move(connection, number, Happening.REQUEUED, now, not_before=now)


def _times(connection: Connection, job_id: int, happening: Happening, since: float) -> int:
    """Return how often something has happened to a job since it was wanted."""
    query = select(func.count()).select_from(event)
    query = query.where((event.c.job_id == job_id) & (event.c.name == f"job.{happening}") & (event.c.at >= since))
    return int(connection.execute(query).scalar_one())
