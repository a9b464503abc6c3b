"""What may be deleted, and why. The first rule is what may not: nothing that somebody still has to get or counts on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dicom_node.lifecycle import Kind, State

DAY = 86400.0  # seconds
SETTLED = 3600.0
"""Seconds without any activity before a study may go, however full the disk: what comes late belongs to it."""

ENDED_WELL = frozenset({State.DONE, State.NOT_APPLICABLE, State.CANCELLED})
"""A failed job is not among them: its study waits until the operator requeues or cancels it."""


class Objection(StrEnum):
    """Why a study stays."""

    ARRIVING = "more of it may come"
    UNFINISHED = "a job of it has not ended, or has failed"
    UNCOMMITTED = "a peer has not committed its results"
    PROMISED = "the node has promised to keep it"
    YOUNG = "its time has not come"


class Ground(StrEnum):
    """Why a study goes."""

    AGE = "age"
    FREE_SPACE = "free space"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator has set; days count from the end of all work on a study, 0 keeps for ever."""

    days: float = 0.0
    promise_days: float = 0.0  # 0: a promise holds for ever
    only_committed: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """One job of a study; `asked` and `committed` count the results that its peer was asked to commit."""

    kind: Kind
    state: State
    asked: int = 0
    committed: int = 0


@dataclass(frozen=True, slots=True)
class Study:
    """All that decides about a study; times are seconds on one clock."""

    study_instance_uid: str
    last_activity: float  # the last instance, the end of an association, the end of a job
    is_complete: bool  # every series, in its present revision
    is_held: bool  # an open association has sent some of it
    work: Sequence[Work] = ()
    promised_at: float | None = None  # the last promise to keep some of it (PS3.4 Annex J, the node as SCP)


def objection(study: Study, policy: Policy, *, now: float) -> Objection | None:
    """Return why a study must stay whatever its age and however full the disk; None where it is finished."""
    if not study.is_complete or study.is_held or now - study.last_activity < SETTLED:
        return Objection.ARRIVING
    if any(work.state not in ENDED_WELL for work in study.work):
        return Objection.UNFINISHED
    delivered = [work for work in study.work if work.kind is Kind.DELIVER and work.state is State.DONE]
    if any(work.committed < work.asked or (policy.only_committed and not work.asked) for work in delivered):
        return Objection.UNCOMMITTED
    return Objection.PROMISED if _is_promised(study, policy, now) else None


def judge(study: Study, policy: Policy, *, is_low: bool, now: float) -> Ground | Objection:
    """Return on which ground a study goes, or why it stays; `is_low` says that the disk has too little free space."""
    if reason := objection(study, policy, now=now):
        return reason
    if policy.days and now - study.last_activity >= policy.days * DAY:
        return Ground.AGE
    return Ground.FREE_SPACE if is_low else Objection.YOUNG


def departures(studies: Iterable[Study], policy: Policy, *, is_low: bool, now: float) -> list[tuple[Study, Ground]]:
    """Return the studies that may go, the one without activity for longest first."""
    judged = [(study, judge(study, policy, is_low=is_low, now=now)) for study in studies]
    going = [(study, verdict) for study, verdict in judged if isinstance(verdict, Ground)]
    return sorted(going, key=lambda pair: (pair[0].last_activity, pair[0].study_instance_uid))


def _is_promised(study: Study, policy: Policy, now: float) -> bool:
    if study.promised_at is None:
        return False
    return not policy.promise_days or now - study.promised_at < policy.promise_days * DAY
