"""Figures for whoever watches the node: counts and ages, no UIDs, nobody's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import distinct, func, select

from dicom_node.ledger.database import Database
from dicom_node.ledger.schema import commitment, commitment_request, holding, job, series
from dicom_node.lifecycle import State


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the ledger says at one moment; ages in seconds, 0 where there is nothing."""

    jobs: Mapping[tuple[str, str], int]  # by kind and state
    oldest_due: Mapping[str, float]  # by kind: since when the job that has waited longest could run
    overdue_leases: int  # running jobs whose worker has been silent for too long
    workers: int  # that hold a job
    series_open: int  # not yet complete
    associations_sending: int  # open, and part of a series has come
    commitments_asked: int  # instances of results for which a peer's answer is awaited
    oldest_commitment: float
    commitments_owed: int  # requests that the node has not reported on


class Figures:
    """Counts what there is."""

    def __init__(self, database: Database) -> None:
        """Use `database`."""
        self._database = database

    def numbers(self, *, now: float) -> Numbers:
        """Return what there is; raise LedgerUnavailable where the ledger does not answer."""
        due = (job.c.state == State.QUEUED) & (job.c.not_before <= now)
        running = job.c.state == State.RUNNING
        asked = commitment.c.state == "asked"
        with self._database.reading() as connection:

            def one(query: object) -> int:
                return int(connection.execute(query).scalar_one() or 0)  # type: ignore[call-overload]

            states = connection.execute(select(job.c.kind, job.c.state, func.count()).group_by(job.c.kind, job.c.state))
            jobs = {(str(kind), str(state)): int(number) for kind, state, number in states}
            waiting = connection.execute(select(job.c.kind, func.min(job.c.not_before)).where(due).group_by(job.c.kind))
            oldest = {str(kind): max(now - float(since), 0.0) for kind, since in waiting}
            first_asked = connection.execute(select(func.min(commitment.c.asked_at)).where(asked)).scalar()
            return Numbers(
                jobs=jobs,
                oldest_due=oldest,
                overdue_leases=one(select(func.count()).where(running & (job.c.lease_until < now))),
                workers=one(select(func.count(distinct(job.c.worker))).where(running)),
                series_open=one(select(func.count()).where(series.c.complete_revision < series.c.revision)),
                associations_sending=one(select(func.count(distinct(holding.c.association_id)))),
                commitments_asked=one(select(func.count()).where(asked)),
                oldest_commitment=max(now - float(first_asked), 0.0) if first_asked is not None else 0.0,
                commitments_owed=one(select(func.count()).where(commitment_request.c.ended_at.is_(None))),
            )
