"""The loop that finds series complete and turns them into jobs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import structlog

from dicom_node.assembly import Decision, Evidence, decide
from dicom_node.attributes import read_attributes
from dicom_node.catalogue import ModelFolder
from dicom_node.config import CompletionTable
from dicom_node.errors import InputRefused, NodeError
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import OpenSeries, StoredInstance
from dicom_node.ledger.journal import Subject
from dicom_node.routing import Order, Route, match
from dicom_node.services import Use, use_of
from dicom_node.spool import Spool

log = structlog.get_logger()

Foresee = Callable[[str, str], None]
"""Takes a Series Instance UID, and the name of a model."""

_AFTER_A_DEFECT = 5.0  # seconds until a series that could not be looked at is looked at again


class Assembler:
    """Looks at every open series, decides by evidence, orders by route."""

    def __init__(
        self,
        ledger: Ledger,
        spool: Spool,
        *,
        completion: CompletionTable,
        routes: Sequence[Route],
        catalogue: Mapping[str, ModelFolder],
        foresee: Foresee = lambda _series_instance_uid, _model: None,
    ) -> None:
        """Read facts from `ledger` and one header of each complete series from `spool`.

        `foresee` is told of a series that will be complete when it has settled, and of the model that comes first.
        """
        self._ledger = ledger
        self._spool = spool
        self._completion = completion
        self._routes = routes
        self._asked = frozenset(keyword for route in routes for keyword in route.when)
        self._catalogue = catalogue
        self._foresee = foresee
        self._ask_again: dict[_Look, float] = {}
        self._foreseen: dict[str, int] = {}  # how many instances an open series had then

    def tick(self, *, now: float) -> int:
        """Complete every series that is; return how many jobs were made."""
        shortest = min(self._completion.settle, self._completion.quiet)
        open_series = self._ledger.arrivals.open_series()
        free = {_look(series): series for series in open_series if not series.held_open}
        fresh = free.keys() - self._ask_again.keys()
        # what is known of a series changes only with its activity: it is not read again before it can be complete
        self._ask_again = {look: self._ask_again.get(look, look.last_activity + shortest) for look in free}
        made = sum(self._attempt(free[look], now) for look, due in list(self._ask_again.items()) if due <= now)
        still_open = {series.series_instance_uid for series in open_series}
        self._foreseen = {uid: number for uid, number in self._foreseen.items() if uid in still_open}
        for look in [look for look in self._ask_again if look in fresh]:  # what settles first is first
            self._look_ahead(free[look])
        return made

    @property
    def due(self) -> float:
        """Return when the next series can be complete, of those that no association holds; infinite where none is."""
        return min(self._ask_again.values(), default=math.inf)

    def _attempt(self, series: OpenSeries, now: float) -> int:
        """Consider one series; what breaks on it must not hold up the others."""
        try:
            return self._consider(series, now)
        except NodeError:
            raise
        except Exception as error:
            log.exception("series.defect", series_instance_uid=series.series_instance_uid, error=type(error).__name__)
            self._ask_again[_look(series)] = now + _AFTER_A_DEFECT
            return 0

    def _look_ahead(self, series: OpenSeries) -> None:
        """Tell of a series that will be complete when it has settled; while it grows, each time that it has doubled."""
        uid, settle = series.series_instance_uid, self._completion.settle
        if not self._routes or series.received < 2 * self._foreseen.get(uid, 0):
            return
        try:
            instances = self._ledger.arrivals.instances_of(uid)
            settled = series.last_activity + settle
            if decide(
                evidence_of(series, instances), now=settled, settle=settle, quiet=self._completion.quiet
            ).complete:
                self._foreseen[uid] = series.received
                for order in sorted(self._matching(series, instances), key=lambda order: order.priority)[:1]:
                    self._foresee(uid, order.model)
        except Exception as error:  # it will be said when the series is complete
            log.debug("series.not_foreseen", series_instance_uid=uid, error=type(error).__name__)

    def _consider(self, series: OpenSeries, now: float) -> int:
        instances = self._ledger.arrivals.instances_of(series.series_instance_uid)
        decision = decide(
            evidence_of(series, instances), now=now, settle=self._completion.settle, quiet=self._completion.quiet
        )
        if not decision.complete:
            self._ask_again[_look(series)] = decision.ask_again
            return 0
        self._ask_again.pop(_look(series), None)
        return self._complete(series, instances, decision, now)

    def _complete(self, series: OpenSeries, instances: Sequence[StoredInstance], decision: Decision, now: float) -> int:
        orders = self._orders(series, instances, now)
        made = self._ledger.jobs.complete(
            series.series_instance_uid,
            revision=series.revision,
            last_activity=series.last_activity,
            reason=decision.reason,
            orders=[(order, self._catalogue[order.model].digest) for order in orders],
            now=now,
        )
        if made is None:
            return 0
        log.info(
            "series.complete",
            series_instance_uid=series.series_instance_uid,
            revision=series.revision,
            reason=decision.reason,
            jobs=made,
            models=[order.model for order in orders],
        )
        return len(made)

    def _orders(self, series: OpenSeries, instances: Sequence[StoredInstance], now: float) -> tuple[Order, ...]:
        """Return what to run; nothing where no header can be read, which is noted."""
        try:
            return self._matching(series, instances)
        except InputRefused as error:
            log.error("series.unreadable", series_instance_uid=series.series_instance_uid, reason=str(error))
            subject = Subject(series.study_instance_uid, series.series_instance_uid)
            self._ledger.history.note("series.unreadable", now=now, subject=subject, reason=str(error))
            return ()

    def _matching(self, series: OpenSeries, instances: Sequence[StoredInstance]) -> tuple[Order, ...]:
        """Return what to run; nothing on the node's own results nor on objects that are no images.

        Raises InputRefused where the header of an image cannot be read.
        """
        image = next((instance for instance in instances if use_of(instance.sop_class_uid) is not Use.KEPT), None)
        if series.is_own_result or image is None or not self._routes:
            return ()
        attributes = read_attributes(self._spool.absolute(image.path), series.calling_ae_title, self._asked)
        return match(self._routes, attributes)


class _Look(NamedTuple):
    """One look at a series: where something has come since, it is another."""

    series_instance_uid: str
    revision: int
    last_activity: float


def _look(series: OpenSeries) -> _Look:
    return _Look(series.series_instance_uid, series.revision, series.last_activity)


def evidence_of(series: OpenSeries, instances: Sequence[StoredInstance]) -> Evidence:
    """Return what the ledger knows about the completeness of a series."""
    return Evidence(
        received=len(instances),
        announced=series.announced,
        whole=all(use_of(instance.sop_class_uid) is not Use.IMAGE for instance in instances),
        places=[instance.place for instance in instances if instance.place is not None],
        held_open=series.held_open,
        released=series.released,
        last_activity=series.last_activity,
    )
