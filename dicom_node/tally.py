"""How often what has happened: the lines of the log as numbers, with the few words that tell them apart."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

TALLIED: Mapping[str, str | None] = {
    # the event's name in the log, and the field that tells its kinds apart: words of ours or numbers of the standard
    "association.ended": "how",
    "association.rejected": "reason",
    "broker.unreachable": None,
    "child.died": None,
    "connection.refused": None,
    "instance.quarantined": None,
    "job.ended": None,
    "jobs.recovered": None,
    "message.ignored": "reason",
    "node.defect": None,
    "node.waiting": None,
    "pdu.refused": None,
    "presentation_context.refused": None,
    "series.complete": None,
    "store.defect": None,
    "store.refused": "status",
    "tls.refused": "reason",
    "tls.reloaded": None,
    "tls.not_reloaded": None,
}
AMOUNTS: Mapping[str, str] = {
    # of association.ended: the field, and what a metric calls it
    "stored": "stored",
    "duplicate": "duplicate",
    "quarantined": "quarantined",
    "refused": "refused",
}
_MOST_KINDS = 64  # of one event: a reason that somebody else words must not grow without end

_lock = threading.Lock()
_events: Counter[tuple[str, str]] = Counter()
_instances: Counter[str] = Counter()
_megabytes = 0.0
_elsewhere: Callable[[str], object] | None = None


def count_elsewhere(tell: Callable[[str], object]) -> None:
    """Have another process count as well what is counted in this: `tell` brings a line to its `count_line`."""
    global _elsewhere
    _elsewhere = tell


def count_line(line: str | bytes) -> None:
    """Count what another process has told; what is no such line counts for nothing."""
    with suppress(ValueError):
        count(json.loads(line))


def count(event: Mapping[str, Any]) -> None:
    """Count one line of the log."""
    global _megabytes
    name = str(event.get("event", ""))
    if name not in TALLIED:
        return
    field = TALLIED[name]
    if _elsewhere is not None:
        wanted = {"event", field, "megabytes", *AMOUNTS}
        _elsewhere(json.dumps({key: value for key, value in event.items() if key in wanted}, default=str) + "\n")
    kind = str(event.get(field, "")) if field else ""
    with _lock:
        if (name, kind) not in _events and sum(known == name for known, _ in _events) >= _MOST_KINDS:
            kind = "other"
        _events[name, kind] += 1
        if name == "association.ended":
            for outcome, metric in AMOUNTS.items():
                _instances[metric] += int(event.get(outcome, 0))
            _megabytes += float(event.get("megabytes", 0.0))


def events() -> dict[tuple[str, str], int]:
    """Return how often each event has happened in this process, by name and kind."""
    with _lock:
        return dict(_events)


def instances() -> tuple[dict[str, int], float]:
    """Return how many instances associations that have ended brought, by outcome, and how many megabytes."""
    with _lock:
        return dict(_instances), _megabytes
