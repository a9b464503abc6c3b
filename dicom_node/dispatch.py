"""Due jobs become messages. A message is a hint and nothing more, the number of a job: it may be lost or doubled.

Another kind of hint names a series, and a model that a job will probably come for: a worker that is idle reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import redis
import structlog
from celery import Celery
from kombu.exceptions import OperationalError

from dicom_node.broker import connect, explained
from dicom_node.config import Settings
from dicom_node.errors import BrokerUnavailable
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Kind
from dicom_node.messages import celery_settings

log = structlog.get_logger()

RUN, FORESEE = "dicom_node.run", "dicom_node.foresee"
"""The names of the Celery tasks: of a job's number; of a series and a model. With the ledger, all that is shared."""

QUEUES: dict[Kind, str] = {Kind.INFER: "infer", Kind.DELIVER: "deliver"}
"""A queue for each kind of work, so that a PACS that hangs never holds up a model."""

_DEPTH = 32  # messages that may wait in a queue; more would only grow stale
_FLOOD = 8 * _DEPTH  # more than any number of nodes put there


class Hints:
    """Sends messages, as long as a queue is short; that one went out stands in the ledger."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        """Send to the broker that `settings` names; it is connected to when it is first needed."""
        self._ledger = ledger
        self._redis = connect(settings)
        self._celery = Celery("dicom_node", set_as_current=False)
        self._celery.conf.update(celery_settings(settings))

    def send(self, numbers: Mapping[Kind, Sequence[int]], *, now: float) -> int:
        """Send the numbers of jobs, by kind, as far as there is room; return how many went out.

        Raises BrokerUnavailable: what was not sent stays due, and the next sweep sends it.
        """
        sent: list[int] = []
        try:
            for kind, due in numbers.items():
                room = max(0, _DEPTH - self._waiting(QUEUES[kind])) if due else 0
                for number in due[:room]:
                    self._celery.send_task(RUN, args=[number], queue=QUEUES[kind], retry=False)
                    sent.append(number)
        except (redis.RedisError, OperationalError, OSError) as error:
            raise BrokerUnavailable(explained(error)) from error
        finally:
            if sent:
                self._ledger.queue.hinted(sent, now=now)
        return len(sent)

    def foresee(self, series_instance_uid: str, model: str, *, within: float) -> None:
        """Say that a job of `model` will probably come for a series; after `within` seconds it is nobody's concern.

        Raises BrokerUnavailable.
        """
        queue = QUEUES[Kind.INFER]
        try:
            if not self._redis.llen(queue):  # else there is something to do
                arguments = [series_instance_uid, model]
                self._celery.send_task(FORESEE, args=arguments, queue=queue, retry=False, expires=within)
        except (redis.RedisError, OperationalError, OSError) as error:
            raise BrokerUnavailable(explained(error)) from error

    def _waiting(self, queue: str) -> int:
        """Return how many messages wait; a queue that somebody floods is emptied: what is lost is sent again."""
        number = int(self._redis.llen(queue))
        if number <= _FLOOD:
            return number
        self._redis.unlink(queue)
        log.warning("queue.emptied", queue=queue, messages=number, reason="more than the node ever puts there")
        return 0

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self._celery.close()


class Dispatcher:
    """Sends a message for each job that is due."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        """Read jobs from `ledger`; send to the broker that `settings` names."""
        self._ledger = ledger
        self._jobs = settings.jobs
        self._patience = settings.delivery.patience
        self._hints = Hints(settings, ledger)
        self._reachable = True

    def sweep(self, *, now: float) -> int:
        """Recover abandoned jobs, then send what is due; return how many messages went out.

        A broker that does not answer is logged once, and costs nothing but time: the jobs stay queued.
        """
        if not self._ledger.queue.needs_attention(now=now, hint_again=self._jobs.hint_again):
            return 0
        recovered = self._ledger.jobs.recover(maximum_deaths=self._jobs.maximum_deaths, now=now)
        if recovered:
            log.warning("jobs.recovered", number=recovered, reason="their workers' leases ran out")
        overdue = self._ledger.commitments.overdue(now=now, patience=self._patience)
        if overdue:
            log.warning("commitments.overdue", number=overdue, reason="their peers have not reported")
        # asked kind by kind: a long line of inferences must not hide the deliveries behind it
        due = {
            kind: self._ledger.queue.due(
                kind, now=now, hint_again=self._jobs.hint_again, limit=_DEPTH, courtesy=self._jobs.courtesy
            )
            for kind in QUEUES
        }
        if not any(due.values()):
            return 0
        try:
            sent = self._hints.send(due, now=now)
        except BrokerUnavailable as error:
            self._note_reachable(False, str(error))
            return 0
        self._note_reachable(True)
        return sent

    def foresee(self, series_instance_uid: str, model: str, *, within: float) -> None:
        """Have a worker that is idle read a series for which a job of `model` may come, `within` seconds."""
        if not self._reachable:
            return
        try:
            self._hints.foresee(series_instance_uid, model, within=within)
        except BrokerUnavailable as error:
            self._note_reachable(False, str(error))

    def _note_reachable(self, reachable: bool, reason: str = "") -> None:
        if reachable != self._reachable:
            self._reachable = reachable
            if reachable:
                log.info("broker.reachable")
            else:
                log.error("broker.unreachable", reason=reason)

    def close(self) -> None:
        """Close the connections."""
        self._hints.close()
