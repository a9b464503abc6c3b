"""What a monitor reads, in Prometheus's text format: counts and ages, no UIDs, nobody's identity."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from dicom_node import __version__, tally
from dicom_node.errors import Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.figures import Numbers
from dicom_node.lifecycle import Kind, State

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PLAIN: tuple[tuple[str, str, Callable[[Numbers], float]], ...] = (
    ("lease_overdue_jobs", "Running jobs whose worker has been silent for too long.", lambda n: n.overdue_leases),
    ("workers_busy", "Workers that hold a job.", lambda n: n.workers),
    ("series_open", "Series that are not yet complete.", lambda n: n.series_open),
    ("associations_sending", "Open associations that have sent part of a series.", lambda n: n.associations_sending),
    ("commitments_awaited", "Result instances that a peer has yet to commit.", lambda n: n.commitments_asked),
    ("commitment_oldest_seconds", "How long the oldest of them has been awaited.", lambda n: n.oldest_commitment),
    (
        "commitment_requests_open",
        "Requests of others that the node has yet to report on.",
        lambda n: n.commitments_owed,
    ),
)


class Metrics(Collector):
    """Collects when it is asked: what the ledger, the disk, the broker and the log of this process say."""

    def __init__(
        self, ledger: Ledger, storage: Path, *, associations: Callable[[], int], broker_answers: Callable[[], bool]
    ) -> None:
        """Ask these; `associations` returns how many are open."""
        self._ledger = ledger
        self._storage = storage
        self._associations = associations
        self.broker_answers = broker_answers
        self._registry = CollectorRegistry()
        self._registry.register(_Described(self))

    def text(self) -> bytes:
        """Return everything, as Prometheus scrapes it."""
        return generate_latest(self._registry)

    def ledger_answers(self) -> bool:
        """Return whether the ledger answers."""
        return self._numbers() is not None

    def _numbers(self) -> Numbers | None:
        try:
            return self._ledger.figures.numbers(now=time.time())
        except Unavailable:
            return None

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        yield _gauge("info", "The version that runs.", [((__version__,), 1)], "version")
        yield _gauge("associations_open", "Associations that are open.", [((), self._associations())])
        yield _gauge("storage_free_bytes", "Free on the storage folder's disk.", [((), _free(self._storage))])
        files = _written(self._storage / "arrived")
        yield _gauge("arrived_files", "Instances that are being received or not yet in the ledger.", [((), files)])
        yield _gauge("broker_up", "Whether the broker answers.", [((), self.broker_answers())])
        numbers = self._numbers()
        yield _gauge("ledger_up", "Whether the ledger answers.", [((), numbers is not None)])
        if numbers is not None:
            yield from _of_ledger(numbers)
        yield from _of_log()


class _Described(Collector):
    """Registers without collecting: the registry would ask the ledger once more."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        return self._metrics.collect()


def _of_ledger(numbers: Numbers) -> Iterator[Metric]:
    states = [((kind.value, state.value), numbers.jobs.get((kind, state), 0)) for kind in Kind for state in State]
    yield _gauge("jobs", "Jobs by kind and state.", states, "kind", "state")
    ages = [((kind.value,), numbers.oldest_due.get(kind, 0.0)) for kind in Kind]
    yield _gauge("job_oldest_due_seconds", "How long the oldest due job has waited.", ages, "kind")
    for name, what, number in _PLAIN:
        yield _gauge(name, what, [((), number(numbers))])


def _of_log() -> Iterator[Metric]:
    events = CounterMetricFamily("dicom_node_events", "Lines of the log, by event and kind.", labels=["event", "kind"])
    for (event, kind), number in sorted(tally.events().items()):
        events.add_metric([event, kind], number)
    yield events
    outcomes, megabytes = tally.instances()
    received = CounterMetricFamily(
        "dicom_node_instances", "Instances of associations that have ended, by outcome.", labels=["outcome"]
    )
    for outcome in tally.AMOUNTS.values():
        received.add_metric([outcome], outcomes.get(outcome, 0))
    yield received
    size = CounterMetricFamily("dicom_node_received_bytes", "Bytes of associations that have ended.")
    size.add_metric([], megabytes * 1e6)
    yield size


def _gauge(name: str, what: str, rows: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
    made = GaugeMetricFamily(f"dicom_node_{name}", what, labels=labels)
    for values, number in rows:
        made.add_metric(values, float(number))
    return made


def _written(folder: Path) -> int:
    """Return how many files there are something in, in it and in the parts that it has."""
    number = 0
    with suppress(OSError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                number += _written(Path(entry)) if entry.is_dir() else entry.stat().st_size > 0
    return number


def _free(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0.0
