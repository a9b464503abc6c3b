"""What a worker does: a delivery from end to end; an inference on a line of three, each busy with another job.

The thread that takes messages reads a series and brings it to the model. While the model is at work, that thread
reads the next series that waits, and a third one encodes and keeps what the model said about the one before. So at
most three studies are in memory. Every job that is read is claimed, and its lease goes along with it. A worker that has
nothing to do reads a series that a job will probably come for.

A job whose last attempt ended its worker, or whatever else brought it back, is done alone: what dies with it is not
taken for the culprit.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from dicom_node.config import Settings
from dicom_node.dispatch import Hints
from dicom_node.errors import SettingsError, Unavailable
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Kind
from dicom_node.spool import Spool
from workers.attempt import Attempt
from workers.delivering import Delivering
from workers.station import Station

if TYPE_CHECKING:
    from workers.inferring import Inferring, Loaded, Predicted

log = structlog.get_logger()

_LOOK = 0.2  # seconds between two looks at what waits while the model is at work
_MOMENT = 0.02  # seconds between two looks for what goes through the model together
_HEAD_START = 0.2  # seconds that a job is left to workers that are free
_SOON = 10.0  # seconds before a model ends in which the next series is read; earlier another worker may be free first


@dataclass(slots=True)
class _Read:
    """A job whose series is in memory."""

    attempt: Attempt
    loaded: Loaded


class Pipeline:
    """Runs jobs: the most urgent first, one at a time on the model."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        spool: Spool,
        *,
        worker: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Work as `worker`, the name in the ledger."""
        self._settings = settings
        self._ledger = ledger
        self._worker = worker
        self._clock = clock
        self._hints = Hints(settings, ledger)
        self._spool = spool
        self._made: Inferring | None = None
        self._making = threading.Lock()
        self._delivering = Delivering(settings, ledger, spool)
        self._model, self._record, self._foresight = Station("model"), Station("record"), Station("foresight")
        self._stations = (self._foresight, self._model, self._record)
        self._at_model: Attempt  # the last that was brought
        self._stopping = threading.Event()

    @property
    def _inferring(self) -> Inferring:
        """Return what runs models; a process that only delivers never needs it, nor the memory of torch."""
        with self._making:
            if self._made is None:
                from workers.inferring import Inferring

                self._made = Inferring(self._settings, self._ledger, self._spool, self._hints)
            return self._made

    def run(self, job_id: int) -> None:
        """Do the job if it is ours to do: a message that came twice, or late, finds it claimed and does nothing.

        Returns when the next message may come: a delivery has ended then, an inference has left the model. A ledger
        that is away leaves the job as it is; its lease, or the next message, brings it back.
        """
        try:
            self._ledger.require_schema()
            for number in self._in_order(job_id):
                if not self._stopping.is_set() and (attempt := self._claimed(number)) is not None:
                    self._do(attempt)
        except Unavailable as error:
            log.error("job.unrecorded", job=job_id, reason=str(error))
        except SettingsError as error:  # the node has been upgraded and this process has not: others can do the job
            log.error("worker.outdated", reason=str(error))
            os.kill(os.getpid(), signal.SIGTERM)

    def foresee(self, series_instance_uid: str, model: str) -> None:
        """Read a series for which a job of `model` will probably come, unless there is something to do."""

        def read() -> None:
            try:
                self._inferring.foresee(series_instance_uid, model)
            except Exception as error:  # what is wrong with it, the job will say
                log.debug("series.not_foreseen", series_instance_uid=series_instance_uid, error=type(error).__name__)

        if not self._stopping.is_set() and all(station.is_free(within=0) for station in self._stations):
            self._foresight.take(read)

    def warm(self) -> None:
        """Get ready for the first inference, so that it waits for no import, no table and no model."""
        self._record.take(self._inferring.rehearse)
        for load in self._inferring.warming():
            self._model.take(load)

    def stop(self) -> None:
        """Read nothing more; what was begun is finished."""
        self._stopping.set()

    def close(self) -> None:
        """Finish what was begun, then end what the jobs left running: models in processes of their own."""
        self.stop()
        for station in self._stations:
            station.close()
        if self._made is not None:
            self._made.close()
        self._hints.close()

    def _in_order(self, job_id: int) -> Iterator[int]:
        """Yield what is more urgent than a job, then the job."""
        queue, courtesy = self._ledger.queue, self._settings.jobs.courtesy
        while (urgent := queue.ahead_of(job_id, courtesy=courtesy, now=self._clock())) and not self._stopping.is_set():
            yield urgent
        yield job_id

    def _claimed(self, job_id: int) -> Attempt | None:
        lease = self._settings.jobs.lease
        job = self._ledger.jobs.claim(job_id, worker=self._worker, lease=lease, now=self._clock())
        if job is None:
            return None
        return Attempt(job, settings=self._settings, ledger=self._ledger, clock=self._clock)

    def _do(self, attempt: Attempt) -> None:
        if attempt.job.kind is Kind.DELIVER:
            attempt.last_step(lambda: self._delivering(attempt.job, attempt.watch))
        elif attempt.job.attempts > 1:
            self._clear()
            if (ready := self._read(attempt)) is not None:
                self._bring(ready)
            self._clear()
        else:
            ready = self._read(attempt)
            while ready is not None:
                self._bring(ready, *self._others(ready))
                ready = self._read_ahead()

    # -- the line: read, model, record ------------------------------------------------------------------------

    def _read(self, attempt: Attempt) -> _Read | None:
        loaded = attempt.step(lambda: self._inferring.load(attempt))
        return None if loaded is None else _Read(attempt, loaded)

    def _clear(self) -> None:
        """Wait until there is nothing on the line, nor beside it."""
        for station in self._stations:
            station.is_free()

    def _others(self, first: _Read) -> list[_Read]:
        """Read what goes through the model together with a small input: what waits, or comes within a moment."""
        together = first.loaded.model.manifest.execution.together
        until = time.monotonic() + together.wait_seconds
        others: list[_Read] = []
        while len(others) + 1 < together.size and not self._stopping.is_set():
            number = self._ledger.queue.alike(first.attempt.job, now=self._clock())
            attempt = None if number is None else self._claimed(number)
            read = None if attempt is None else self._read(attempt)
            if read is not None:
                others.append(read)
            elif number is None and time.monotonic() >= until:
                break
            elif number is None:
                time.sleep(_MOMENT)
        return others

    def _bring(self, *group: _Read) -> None:
        """Have the model run, on several studies at once where there are several; what it says is then recorded."""

        def predict() -> None:
            predicted: Sequence[Predicted | None] | None = None
            if len(group) > 1:
                predicted = self._inferring.predict_together([(each.attempt, each.loaded) for each in group])
            if predicted is None:
                predicted = [
                    each.attempt.step(partial(self._inferring.predict, each.attempt, each.loaded)) for each in group
                ]
            attempts = [each.attempt for each in group]
            self._record.take(lambda: self._keep(zip(attempts, predicted, strict=True)))

        self._model.take(predict)
        self._at_model = group[0].attempt

    def _keep(self, answers: Iterable[tuple[Attempt, Predicted | None]]) -> None:
        for attempt, predicted in answers:
            if predicted is not None:
                attempt.last_step(partial(self._inferring.record, attempt, predicted))

    def _read_ahead(self) -> _Read | None:
        """Wait for the model to be free; return the next job, with its series read, where one waits meanwhile."""
        ahead: _Read | None = None
        while not self._stopping.is_set():
            found = self._waiting(ahead)
            if found is not None and (attempt := self._claimed(found)) is not None:
                if ahead is not None:
                    ahead.attempt.put_back("more_urgent")
                ahead = self._read(attempt)
                self._interrupt_for(ahead)
            elif self._model.is_free(within=_LOOK):
                return ahead
        if ahead is not None:
            ahead.attempt.put_back("worker_stops")
        return None

    def _waiting(self, ahead: _Read | None) -> int | None:
        """Return a job to read now: the first that waits, or one that is more urgent than what was read already."""
        now, courtesy = self._clock(), self._settings.jobs.courtesy
        found = self._ledger.queue.waiting(Kind.INFER, courtesy=courtesy, since=now - _HEAD_START, now=now)
        if found is None or found.attempts > 0:
            return None
        if ahead is not None:
            return found.job_id if found.priority < ahead.attempt.job.priority else None
        return found.job_id if self._ends_soon() or found.priority < self._at_model.job.priority else None

    def _ends_soon(self) -> bool:
        """Return whether the model is nearly done, as far as its pace tells; where it does not, it may be."""
        left = self._inferring.remaining(self._at_model, now=self._clock())
        return left is None or left < _SOON

    def _interrupt_for(self, ahead: _Read | None) -> None:
        """Have the job at the model give way to a more urgent one, unless it has done so for long enough."""
        at_model = self._at_model
        if ahead is None or ahead.attempt.job.priority >= at_model.job.priority:
            return
        job, courtesy = at_model.job, self._settings.jobs.courtesy
        if courtesy.gives_way(wanted_since=job.wanted_since, yielded=job.yielded, now=self._clock()):
            at_model.lease.give_way()
