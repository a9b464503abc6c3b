"""One job, as the ledger has it, and the one way in which its state changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select, update

from dicom_node.ledger.journal import Subject, write_event
from dicom_node.ledger.schema import job, series
from dicom_node.lifecycle import Happening, IllegalTransition, Kind, State, advance
from dicom_node.routing import Priority

PEER_UNREACHABLE = "peer_unreachable"
_AT_ONCE = 500  # rows that one statement names


@dataclass(frozen=True, slots=True)
class Job:
    """One durable unit of work; `lease_token` proves that its holder still owns it."""

    job_id: int
    kind: Kind
    state: State
    key: str
    series_instance_uid: str
    study_instance_uid: str
    revision: int
    model: str
    routes: tuple[str, ...]
    send_to: tuple[str, ...]
    priority: Priority
    yielded: int
    parent_id: int | None
    peer: str | None
    attempts: int
    not_before: float
    lease_token: str | None
    progress: float
    reason: str | None
    detail: str | None
    created_at: float
    wanted_since: float
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True, slots=True)
class StoredResult:
    """One encoded result object on disk; its bytes are written once and re-sent unchanged."""

    sop_instance_uid: str
    sop_class_uid: str
    series_instance_uid: str
    study_instance_uid: str
    transfer_syntax_uid: str
    kind: str
    path: str
    sha256: str
    size: int
    form: str | None = None  # which set of results it belongs to; None: to every one


class LostLease(Exception):
    """The job was taken from this worker: its lease ran out and somebody else has it, or it was cancelled."""


def select_jobs() -> Any:
    """Return the query for jobs with their studies; its rows are what `job_of` takes."""
    return select(job, series.c.study_instance_uid).join_from(job, series)


def read_job(connection: Connection, job_id: int) -> Job:
    """Return a job, locked until the transaction ends."""
    query = select_jobs().where(job.c.job_id == job_id).with_for_update(of=job)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise IllegalTransition(f"there is no job {job_id}")
    return job_of(row)


def job_of(row: Mapping[Any, Any]) -> Job:
    """Return the job that a row is."""
    values = {name: row[name] for name in Job.__slots__}
    values.update(
        kind=Kind(row["kind"]),
        priority=Priority(row["priority"]),
        state=State(row["state"]),
        routes=tuple(row["routes"]),
        send_to=tuple(row["send_to"]),
    )
    return Job(**values)


def owned(held: Job) -> Any:
    """Return the condition that a job still belongs to who holds it."""
    return (job.c.job_id == held.job_id) & (job.c.state == State.RUNNING) & (job.c.lease_token == held.lease_token)


def lock_owned(connection: Connection, held: Job) -> None:
    """Lock a job until the transaction ends; raise LostLease where it is not ours any more."""
    query = select(job.c.job_id).where(owned(held)).with_for_update()
    if connection.execute(query).scalar() is None:
        raise LostLease


def move(
    connection: Connection,
    job_id: int,
    happening: Happening,
    now: float,
    *,
    reason: str | None = None,
    detail: str | None = None,
    not_before: float | None = None,
    **fields: Any,
) -> State:
    """Move a job along the table and write the event; the only statement that changes a state but the claim."""
    before = read_job(connection, job_id)
    after = advance(before.state, happening)
    values: dict[str, Any] = {"state": after, "reason": reason, "detail": detail, "lease_token": None}
    if after is State.QUEUED:
        values.update(not_before=not_before if not_before is not None else now, hinted_at=None, lease_until=None)
    elif after is State.COMMITTING:
        values.update(not_before=not_before, lease_until=None, progress=1.0)
    else:
        values.update(ended_at=now, lease_until=None, progress=1.0 if after is State.DONE else before.progress)
    connection.execute(update(job).where(job.c.job_id == job_id).values(**values))
    subject = Subject(before.study_instance_uid, before.series_instance_uid)
    fields |= {key: value for key, value in (("reason", reason), ("detail", detail)) if value}
    if after is State.QUEUED and not_before and not_before > now:
        fields["retry_in"] = f"{not_before - now:.0f} s"
    write_event(connection, f"job.{happening}", now, subject, job_id=job_id, **fields)
    if before.peer is not None and happening in (Happening.FINISHED, Happening.HANDED_OVER):
        _let_go(connection, before.peer, now)
    elif before.peer is not None and reason == PEER_UNREACHABLE and after is State.QUEUED and not_before:
        _hold_back(connection, before.peer, not_before)
    return after


def tries(connection: Connection, peer: str) -> int:
    """Return how often a peer was tried in vain for one and the same delivery that still waits for it."""
    query = select(func.max(job.c.attempts)).where(_waits_for(peer) & (job.c.reason == PEER_UNREACHABLE))
    return int(connection.execute(query).scalar() or 0)


def _hold_back(connection: Connection, peer: str, until: float) -> None:
    """Have every delivery to a peer that is away wait: else each finds that out for itself, and all others wait."""
    _others(connection, _waits_for(peer) & (job.c.not_before < until), until, PEER_UNREACHABLE)


def _let_go(connection: Connection, peer: str, now: float) -> None:
    """Have whatever waits for a peer to come back be sent now: it is there."""
    _others(connection, _waits_for(peer) & (job.c.reason == PEER_UNREACHABLE) & (job.c.not_before > now), now, None)


def _waits_for(peer: str) -> Any:
    return (job.c.kind == Kind.DELIVER) & (job.c.state == State.QUEUED) & (job.c.peer == peer)


def _others(connection: Connection, which: Any, not_before: float, reason: str | None) -> None:
    # what another worker has in its hands is left out: it learns the same, and two that wait for each other do nothing
    query = select(job.c.job_id).where(which).order_by(job.c.job_id).with_for_update(skip_locked=True)
    numbers = connection.execute(query).scalars().all()
    for at in range(0, len(numbers), _AT_ONCE):
        these = job.c.job_id.in_(numbers[at : at + _AT_ONCE])
        values = {"not_before": not_before, "reason": reason, "hinted_at": None}
        connection.execute(update(job).where(these).values(**values))
