"""What each step costs the ledger as it grows, on SQLite and on PostgreSQL: 10,000 to 10 million instances."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

from bench.filling import SERIES_OF, fill, fill_backlog
from bench.measure import OURS, Absent, Figure, Measured, alternate, seconds
from bench.peers import Postgres
from bench.receive import scratch
from dicom_node.entities import AssociationIdentity, Header, Instance, SlicePlace
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import AssociationEnd
from dicom_node.lifecycle import Courtesy, Happening, Kind, Patience
from dicom_node.routing import Order

_SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
_BACKLOG = 100_000
_GROWTH = 3.0  # at most, of what every instance or job pays, from the smallest ledger to the largest
_REPEATS = 5
_SCANNER = AssociationIdentity("", "SCANNER", "DICOM_NODE", "10.0.0.1")


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Measure every step at every size, the sizes in turns; each figure is of the largest ledger, beside the others."""
    sizes = _SIZES[:2] if quick else _SIZES
    backlog = _BACKLOG // (10 if quick else 1)
    found: list[Figure] = []
    with scratch() as folder, ExitStack() as stack:
        places: dict[str, Callable[[str], str]] = {"SQLite": lambda name: f"sqlite:///{folder / name}.sqlite3"}
        with suppress(Absent):
            places["PostgreSQL"] = stack.enter_context(Postgres(folder / "postgres")).url
        for database, place in places.items():
            found += _grown(database, place, sizes, backlog=backlog, rounds=rounds)
    return found


def _grown(
    database: str, place: Callable[[str], str], sizes: Sequence[int], *, backlog: int, rounds: int
) -> list[Figure]:
    """Fill a ledger of each size, and a small one with a backlog; measure them in turns."""
    runs = {f"{size:,} instances": partial(measured, _filled(place(f"l{size}"), size), size) for size in sizes}
    smallest, *_, largest = runs
    queued = _filled(place("backlog"), sizes[0])
    fill_backlog(queued, jobs=backlog, now=time.time())
    waiting = f"{smallest}, {backlog:,} jobs queued"
    os.sync()
    took = alternate({**runs, waiting: partial(measured, queued, sizes[0])}, rounds)
    steps = took[smallest]
    found = [_figure(database, step, took, largest, [each for each in runs if each != largest]) for step in steps]
    return found + [_figure(database, step, took, waiting, [smallest]) for step in ("sweep", "claim", "status")]


def _filled(url: str, size: int) -> str:
    Ledger(url, migrate=True).close()
    fill(url, first=0, last=size)
    return url


def _figure(
    database: str, step: str, took: Mapping[str, Mapping[str, Measured]], ours: str, others: Sequence[str]
) -> Figure:
    return Figure(
        f"{database}, {ours}: {step}",
        "ms",
        took[ours][step].median,
        {each: took[each][step].median for each in others},
        bars={others[0]: _GROWTH} if step in _EVERY_TIME else {},
        spread={OURS: took[ours][step].spread, **{each: took[each][step].spread for each in others}},
    )


_EVERY_TIME = frozenset({"record one instance", "is it held?", "find open series", "complete", "sweep", "claim"})


def measured(url: str, filled: int) -> dict[str, float]:
    """Return the median ms of each step, on a ledger of so many instances; what it adds is ended at once."""
    took: dict[str, list[float]] = {}
    ledger = Ledger(url)
    for repeat in range(_REPEATS + 1):
        for step, do in _Study(ledger, filled).steps().items():
            if repeat:  # the first time, every statement is compiled
                took.setdefault(step, []).append(seconds(do) * 1000)
    ledger.close()
    took["start"] = [seconds(partial(_start, url)) * 1000 for _ in range(2)]
    return {step: statistics.median(each) for step, each in took.items()}


def _start(url: str) -> None:
    """Do what a node does with the ledger before it listens."""
    ledger = Ledger(url, migrate=True)
    ledger.arrivals.forget_associations_of("bench", now=time.time())
    ledger.jobs.abandon_worker("bench#", maximum_deaths=3, now=time.time())
    ledger.close()


@dataclass
class _Study:
    """One new series of three instances on its way through the ledger, and the questions asked meanwhile."""

    ledger: Ledger
    filled: int

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return what is measured, to be called in this order."""
        self.uid = f"2.25.{uuid.uuid4().int}"[:60]
        self.association = AssociationIdentity(uuid.uuid4().hex, "SCANNER", "DICOM_NODE", "10.0.0.1")
        self.now = time.time()
        self.jobs: list[int] = []
        some = self.filled // SERIES_OF // 2
        study = f"2.25.1000000{1_000_000_000 + some}"
        ledger = self.ledger
        return {
            "open a series": partial(self._record, 1),
            "record one instance": partial(self._record, 2),
            "is it held?": lambda: ledger.arrivals.held([f"{self.uid}.2"]),
            "find open series": ledger.arrivals.open_series,
            "complete": self._complete,
            "sweep": self._sweep,
            "claim": self._claim,
            "end": self._end,
            "status": lambda: (ledger.history.counts(), ledger.history.recent_jobs(limit=10)),
            "history of a study": lambda: (ledger.history.events_of(study), ledger.history.results_of(study)),
            "what may leave": lambda: ledger.departures.candidates(silent_since=1.6e9),
        }

    def _record(self, number: int) -> None:
        header = Header(
            sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
            sop_instance_uid=f"{self.uid}.{number}",
            study_instance_uid=f"{self.uid}.8",
            series_instance_uid=f"{self.uid}.9",
            modality="CT",
            number_of_frames=1,
            announced=None,
            place=SlicePlace((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, float(number))),
            is_own_result=False,
        )
        received = Instance(header, "1.2.840.10008.1.2.1", f"studies/{self.uid}.{number}.dcm", "0" * 64, 525_524)
        self.ledger.arrivals.record([(received, self.association, self.now)], node_id="bench", now=self.now)

    def _complete(self) -> None:
        self.ledger.arrivals.associations_ended([AssociationEnd(self.association.association_id, True, self.now)])
        made = self.ledger.jobs.complete(
            f"{self.uid}.9",
            revision=1,
            last_activity=self.now,
            reason="bench",
            orders=[(Order("stub", ("PACS",), ("bench",)), "0" * 64)],
            now=self.now,
        )
        self.jobs = made or []

    def _sweep(self) -> None:
        jobs = self.ledger.jobs
        jobs.recover(maximum_deaths=3, now=self.now)
        self.ledger.commitments.overdue(now=self.now, patience=Patience(5.0, 600.0, 14.0))
        for kind in Kind:
            self.ledger.queue.due(kind, courtesy=Courtesy(3600.0, 3), now=self.now, hint_again=10.0, limit=32)

    def _claim(self) -> None:
        self.claimed = self.ledger.jobs.claim(self.jobs[0], worker="bench", lease=60.0, now=self.now)

    def _end(self) -> None:
        assert self.claimed is not None
        self.ledger.jobs.ended(self.claimed, Happening.REFUSED, now=self.now, reason="bench")
