"""The life of a job, whole, as one table.

A job is the durable unit of work: it infers (runs a model on one revision of a series) or delivers (sends
the results of one job to one peer). Everything that may happen to it is a row below; nothing else can.
Celery, Redis and the retry of C-STORE have no states of their own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

from dicom_node.errors import NodeError


class Kind(StrEnum):
    """What a job does."""

    INFER = "infer"
    DELIVER = "deliver"


class State(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    COMMITTING = "committing"  # sent; the peer has not yet said that it keeps it
    DONE = "done"
    NOT_APPLICABLE = "not_applicable"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Happening(StrEnum):
    """What moves a job; also the name of its event in the ledger."""

    CLAIMED = "claimed"
    FINISHED = "finished"
    DECLINED = "declined"  # the model does not apply: an answer
    POSTPONED = "postponed"  # again, later
    YIELDED = "yielded"  # gave way to something more urgent, or its worker stops: no attempt is counted
    ABANDONED = "abandoned"  # its worker died
    REFUSED = "refused"  # never
    EXHAUSTED = "exhausted"  # too often
    SUPERSEDED = "superseded"  # a later revision of the series makes it pointless
    WITHDRAWN = "withdrawn"  # the operator does not want it any more
    REQUEUED = "requeued"  # the operator wants it again
    HANDED_OVER = "handed_over"  # the peer has stored it and was asked to commit
    COMMITTED = "committed"  # it does, every instance
    NOT_COMMITTED = "not_committed"  # it does not, some instance: that is sent again
    OVERDUE = "overdue"  # it has not said: it is asked again


MISSING_INPUT = "missing_input"
"""Why a model does not apply yet: a series of the study that it needs as well is not there. One that comes helps."""

S, H = State, Happening
TRANSITIONS: dict[tuple[State, Happening], State] = {
    (S.QUEUED, H.CLAIMED): S.RUNNING,
    (S.QUEUED, H.SUPERSEDED): S.CANCELLED,
    (S.QUEUED, H.WITHDRAWN): S.CANCELLED,
    (S.RUNNING, H.WITHDRAWN): S.CANCELLED,
    (S.RUNNING, H.FINISHED): S.DONE,
    (S.RUNNING, H.DECLINED): S.NOT_APPLICABLE,
    (S.RUNNING, H.POSTPONED): S.QUEUED,
    (S.RUNNING, H.YIELDED): S.QUEUED,
    (S.RUNNING, H.ABANDONED): S.QUEUED,
    (S.RUNNING, H.REFUSED): S.FAILED,
    (S.RUNNING, H.EXHAUSTED): S.FAILED,
    (S.RUNNING, H.SUPERSEDED): S.CANCELLED,
    (S.RUNNING, H.HANDED_OVER): S.COMMITTING,
    (S.COMMITTING, H.COMMITTED): S.DONE,
    (S.COMMITTING, H.NOT_COMMITTED): S.QUEUED,
    (S.COMMITTING, H.OVERDUE): S.QUEUED,
    (S.COMMITTING, H.REFUSED): S.FAILED,
    (S.COMMITTING, H.EXHAUSTED): S.FAILED,
    (S.COMMITTING, H.WITHDRAWN): S.CANCELLED,
    (S.COMMITTING, H.REQUEUED): S.QUEUED,
    (S.FAILED, H.REQUEUED): S.QUEUED,
    (S.FAILED, H.SUPERSEDED): S.CANCELLED,
    (S.FAILED, H.WITHDRAWN): S.CANCELLED,  # seen, and given up: it holds its study no longer
    (S.CANCELLED, H.REQUEUED): S.QUEUED,
    (S.NOT_APPLICABLE, H.REQUEUED): S.QUEUED,
    (S.DONE, H.REQUEUED): S.QUEUED,  # of a delivery: the same bytes once more
}

REQUEUEABLE: dict[Kind, frozenset[State]] = {
    # an inference that is done has its results; running it again would make other bytes of the same UIDs
    Kind.INFER: frozenset({S.FAILED, S.CANCELLED, S.NOT_APPLICABLE}),
    Kind.DELIVER: frozenset({S.FAILED, S.CANCELLED, S.DONE, S.COMMITTING}),
}


class IllegalTransition(NodeError):
    """The table has no such row."""


def advance(state: State, happening: Happening) -> State:
    """Return the state that follows; raise IllegalTransition where the table has no row."""
    try:
        return TRANSITIONS[state, happening]
    except KeyError:
        raise IllegalTransition(f"a job that is {state} cannot be {happening}") from None


def backoff(attempts: int, *, first: float, maximum: float, jitter: random.Random) -> float:
    """Return the seconds to wait before attempt `attempts` + 1: doubling, up to `maximum`, spread by half.

    The spread keeps many jobs for one peer from knocking at the same moment when it comes back.
    """
    full = min(maximum, first * 2.0 ** min(attempts - 1, 32))
    return full * jitter.uniform(0.5, 1.0)


def pause_after_death(deaths: int) -> float:
    """Return the seconds until a job is tried again whose workers died so often: none at first, then doubling to 60.

    A worker that is killed is no fault of its job; one that always dies at the same job must not hold up the others.
    """
    return 0.0 if deaths < 3 else min(60.0, 2.0 ** (deaths - 2))


@dataclass(frozen=True, slots=True)
class Courtesy:
    """How long a job gives way to more urgent ones: for so many seconds since it is wanted, and so often at its model.

    After `seconds` a background job stands among the normal ones; after them, or after `times`, none is interrupted.
    """

    seconds: float
    times: int

    def gives_way(self, *, wanted_since: float, yielded: int, now: float) -> bool:
        """Return whether a job that runs still lets itself be interrupted."""
        return now - wanted_since <= self.seconds and yielded < self.times


_DAY = 86400.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How a peer that is away is tried again: pauses in seconds, and days until it is given up."""

    first_delay: float
    maximum_delay: float
    give_up_after_days: float

    def next_try(self, attempts: int, *, now: float, jitter: random.Random) -> float:
        """Return when attempt `attempts` + 1 is due."""
        return now + backoff(attempts, first=self.first_delay, maximum=self.maximum_delay, jitter=jitter)

    def is_over(self, since: float, *, now: float) -> bool:
        """Return whether what is wanted since `since` has been tried long enough."""
        return now - since > self.give_up_after_days * _DAY
