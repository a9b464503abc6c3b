"""Who has promised to keep what: the peers that got results, and the node to those that asked it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, delete, func, select, update

from dicom_node.commitment import Reference, Remedy, Report, Request, remedy
from dicom_node.ledger.database import Database
from dicom_node.ledger.journal import write_event
from dicom_node.ledger.moving import Job, lock_owned, move, read_job
from dicom_node.ledger.schema import commitment, commitment_request, instance, job, series
from dicom_node.lifecycle import Happening, Patience, State

_JITTER = random.Random()  # noqa: S311 - spreads retries; guards no secret
_AT_ONCE = 500  # UIDs in one question to the database


_NEXT_DUE = select(func.min(commitment_request.c.not_before)).where(commitment_request.c.ended_at.is_(None))


class Answer(StrEnum):
    """What a peer has said about one instance."""

    ASKED = "asked"
    COMMITTED = "committed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Promise:
    """What a peer has said about one result of a delivery."""

    sop_instance_uid: str
    answer: Answer
    failure_reason: int | None

    @property
    def is_to_be_sent(self) -> bool:
        """Return whether the instance has to go out once more before the peer is asked again."""
        return self.answer is Answer.FAILED and remedy(self.failure_reason or 0) is Remedy.SEND_AGAIN


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that somebody made of the node and that has not been reported on yet."""

    request_id: int
    calling_ae_title: str
    request: Request
    attempts: int
    asked_at: float


@dataclass(frozen=True, slots=True)
class Known:
    """What the ledger knows of an instance that it is asked to commit."""

    sop_class_uid: str
    path: str
    digest: str


class Commitments:
    """Storage commitment in both roles."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    # -- the node has asked (SCU) ---------------------------------------------------------------------------

    def promises(self, job_id: int) -> list[Promise]:
        """Return what the peer of a delivery has said so far; empty where it has not been asked."""
        query = select(commitment.c.sop_instance_uid, commitment.c.state, commitment.c.failure_reason)
        query = query.where(commitment.c.job_id == job_id).order_by(commitment.c.sop_instance_uid)
        with self._database.reading() as connection:
            return [Promise(uid, Answer(state), reason) for uid, state, reason in connection.execute(query)]

    def ask(self, held: Job, transaction_uid: str, uids: Collection[str], *, now: float) -> None:
        """Note that the peer is about to be asked: its report may come before it has answered the request."""
        with self._database.writing() as connection:
            lock_owned(connection, held)
            values = {
                "transaction_uid": transaction_uid,
                "state": Answer.ASKED,
                "failure_reason": None,
                "asked_at": now,
            }
            for uid in sorted(uids):
                row = self._database.insert(commitment).values(job_id=held.job_id, sop_instance_uid=uid, **values)
                keys = ["job_id", "sop_instance_uid"]
                connection.execute(row.on_conflict_do_update(index_elements=keys, set_=values))

    def forget(self, held: Job) -> None:
        """Forget what the peer has said: everything is sent to it again."""
        with self._database.writing() as connection:
            lock_owned(connection, held)
            connection.execute(delete(commitment).where(commitment.c.job_id == held.job_id))

    def handed_over(
        self, held: Job, *, now: float, ask_again_at: float, patience: Patience, detail: str, **fields: Any
    ) -> None:
        """Let a delivery wait for its peer's report, or end at once where that has come already."""
        with self._database.writing() as connection:
            lock_owned(connection, held)
            move(connection, held.job_id, Happening.HANDED_OVER, now, detail=detail, not_before=ask_again_at, **fields)
            _settle(connection, held.job_id, patience, now)

    def reported(self, report: Report, *, now: float, patience: Patience) -> bool:
        """Record a peer's report; return whether it is about something that the node has asked.

        What it does not mention stays asked. A report that comes twice changes nothing.
        """
        with self._database.writing() as connection:
            query = select(commitment.c.job_id).where(commitment.c.transaction_uid == report.transaction_uid).limit(1)
            job_id = connection.execute(query).scalar()
            if job_id is None:
                return False
            read_job(connection, job_id)  # locks it: a worker may be about to hand it over
            reasons: Mapping[str, int | None] = {
                **{reference.sop_instance_uid: None for reference in report.committed},
                **{reference.sop_instance_uid: reason for reference, reason in report.failed.items()},
            }
            mine = (commitment.c.job_id == job_id) & (commitment.c.transaction_uid == report.transaction_uid)
            for uid, reason in sorted(reasons.items()):
                state = Answer.COMMITTED if reason is None else Answer.FAILED
                connection.execute(
                    update(commitment)
                    .where(mine & (commitment.c.sop_instance_uid == uid) & (commitment.c.state == Answer.ASKED))
                    .values(state=state, failure_reason=reason)
                )
            _settle(connection, job_id, patience, now)
            return True

    def overdue(self, *, now: float, patience: Patience) -> int:
        """Queue again, to be asked again, the deliveries whose peer has not reported in time; return how many."""
        waiting = (job.c.state == State.COMMITTING) & (job.c.not_before <= now)
        with self._database.writing() as connection:
            numbers = connection.execute(select(job.c.job_id).where(waiting).with_for_update()).scalars().all()
            for number in numbers:
                if patience.is_over(read_job(connection, number).wanted_since, now=now):
                    move(connection, number, Happening.EXHAUSTED, now, reason="not_committed", detail="no report came")
                else:
                    move(connection, number, Happening.OVERDUE, now, reason="not_reported", not_before=now)
            return len(numbers)

    # -- the node was asked (SCP) ---------------------------------------------------------------------------

    def asked(self, request: Request, *, calling_ae_title: str, not_before: float, now: float) -> int:
        """Record a request, so that its report outlives the node; return its number. The same again starts anew."""
        references = [[each.sop_class_uid, each.sop_instance_uid] for each in request.references]
        values = {
            "references": references, "asked_at": now, "attempts": 0, "not_before": not_before, "ended_at": None
        }  # fmt: skip
        statement = self._database.insert(commitment_request).values(
            transaction_uid=request.transaction_uid, calling_ae_title=calling_ae_title, **values
        )
        keys = ["calling_ae_title", "transaction_uid"]
        statement = statement.on_conflict_do_update(index_elements=keys, set_=values)
        with self._database.writing() as connection:
            number = connection.execute(statement.returning(commitment_request.c.request_id)).scalar_one()
            fields: dict[str, Any] = {"calling_ae_title": calling_ae_title, "instances": len(references)}
            write_event(connection, "commitment.requested", now, transaction_uid=request.transaction_uid, **fields)
            return int(number)

    def next_due(self) -> float | None:
        """Return when the next report is due; None where nobody waits for one."""
        with self._database.reading() as connection:
            return connection.execute(_NEXT_DUE).scalar()

    def due(self, *, now: float, limit: int) -> list[int]:
        """Return the numbers of requests whose report is due, the oldest first."""
        column = commitment_request.c
        query = select(column.request_id).where(column.ended_at.is_(None) & (column.not_before <= now))
        with self._database.reading() as connection:
            return list(connection.execute(query.order_by(column.not_before).limit(limit)).scalars())

    def pending(self, request_id: int) -> Pending | None:
        """Return a request; None where its report has been taken or given up."""
        query = select(commitment_request).where(commitment_request.c.request_id == request_id)
        with self._database.reading() as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None or row["ended_at"] is not None:
            return None
        references = tuple(Reference(*pair) for pair in row["references"])
        asked = Request(row["transaction_uid"], references)
        return Pending(request_id, row["calling_ae_title"], asked, row["attempts"], row["asked_at"])

    def known(self, uids: Sequence[str]) -> dict[str, Known]:
        """Return what the ledger knows of these SOP Instance UIDs."""
        found: dict[str, Known] = {}
        columns = instance.c.sop_instance_uid, instance.c.sop_class_uid, instance.c.path, instance.c.digest
        with self._database.reading() as connection:
            for start in range(0, len(uids), _AT_ONCE):
                query = select(*columns).where(instance.c.sop_instance_uid.in_(uids[start : start + _AT_ONCE]))
                found |= {uid: Known(*rest) for uid, *rest in connection.execute(query)}
        return found

    def promise(self, uids: Sequence[str], *, now: float) -> frozenset[str]:
        """Record that the node promises to keep these instances, before it says so; return those it still can."""
        kept: set[str] = set()
        with self._database.writing() as connection:
            for start in range(0, len(uids), _AT_ONCE):
                mine = instance.c.sop_instance_uid.in_(uids[start : start + _AT_ONCE])
                theirs = series.c.series_instance_uid.in_(select(instance.c.series_instance_uid).where(mine))
                # locked in one order, as by who deletes: what it has deleted by then is not found any more
                locking = select(series.c.series_instance_uid).where(theirs).order_by(series.c.series_instance_uid)
                found = connection.execute(locking.with_for_update()).scalars().all()
                promised = update(series).where(series.c.series_instance_uid.in_(found)).values(promised_at=now)
                connection.execute(promised)
                kept.update(connection.execute(select(instance.c.sop_instance_uid).where(mine)).scalars())
        return frozenset(kept)

    def answered(self, pending: Pending, report: Report, *, now: float, how: str) -> None:
        """Record that a report was taken."""
        fields = {"committed": len(report.committed), "failed": len(report.failed), "how": how}
        self._end(pending, "commitment.reported", now, fields)

    def given_up(self, pending: Pending, *, now: float, reason: str) -> None:
        """Record that nobody takes a report."""
        self._end(pending, "commitment.given_up", now, {"reason": reason})

    def postponed(self, pending: Pending, *, now: float, not_before: float, reason: str) -> None:
        """Record that a report was not taken, and when to try again."""
        with self._database.writing() as connection:
            connection.execute(_the(pending).values(attempts=pending.attempts + 1, not_before=not_before))
            self._write(connection, pending, "commitment.postponed", now, {"reason": reason})

    def handed_on(self, pending: Pending, *, not_before: float) -> None:
        """Let another process of the node report."""
        with self._database.writing() as connection:
            connection.execute(_the(pending).values(not_before=not_before))

    def _end(self, pending: Pending, name: str, now: float, fields: Mapping[str, Any]) -> None:
        with self._database.writing() as connection:
            connection.execute(_the(pending).values(ended_at=now, attempts=pending.attempts + 1))
            self._write(connection, pending, name, now, fields)

    def _write(
        self, connection: Connection, pending: Pending, name: str, now: float, fields: Mapping[str, Any]
    ) -> None:
        about: dict[str, Any] = {
            "calling_ae_title": pending.calling_ae_title,
            "transaction_uid": pending.request.transaction_uid,
        }
        write_event(connection, name, now, **about, **fields)


def _the(pending: Pending) -> Any:
    return update(commitment_request).where(commitment_request.c.request_id == pending.request_id)


def _settle(connection: Connection, job_id: int, patience: Patience, now: float) -> None:
    """Move a delivery that waits for its peer's report, once everything has been reported."""
    delivery = read_job(connection, job_id)
    if delivery.state is not State.COMMITTING:
        return  # a worker still has it and will look
    query = select(commitment.c.state, commitment.c.failure_reason).where(commitment.c.job_id == job_id)
    rows = connection.execute(query).all()
    if any(state == Answer.ASKED for state, _ in rows):
        return
    reasons = sorted({reason for state, reason in rows if state == Answer.FAILED})
    if not reasons:
        move(connection, job_id, Happening.COMMITTED, now, detail=f"{len(rows)} instances committed")
        return
    detail = "failure reasons " + ", ".join(f"0x{reason:04X}" for reason in reasons)
    if any(remedy(reason) is Remedy.NEVER for reason in reasons):
        move(connection, job_id, Happening.REFUSED, now, reason="not_committed", detail=detail)
    elif patience.is_over(delivery.wanted_since, now=now):
        move(connection, job_id, Happening.EXHAUSTED, now, reason="not_committed", detail=detail)
    else:
        later = patience.next_try(delivery.attempts, now=now, jitter=_JITTER)
        move(connection, job_id, Happening.NOT_COMMITTED, now, reason="not_committed", detail=detail, not_before=later)
