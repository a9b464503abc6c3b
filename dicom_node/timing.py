"""Where the time went between the last image and the last stored result, stage by stage, out of the ledger's events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

SETTLE, CLAIM, OTHER = "settle", "claim", "other"
"""Stages that no worker times: until the series was complete; until a worker took the job; what is left of it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of an inference or of a delivery of its results.

    `share` is its part, 0..1, of all that is told of this inference and its deliveries. `peer` is None before delivery.
    """

    job_id: int
    model: str
    peer: str | None
    name: str
    seconds: float
    share: float


def stages(jobs: Iterable[Row], events: Sequence[Row]) -> list[Stage]:
    """Return the stages of every inference that is done, each followed by those of its deliveries.

    `jobs` and `events` are rows of the ledger, in order: of a study, of a series, or of a job and its deliveries.
    """
    jobs = list(jobs)
    told: list[Stage] = []
    for inference in jobs:
        if inference["kind"] != "infer":
            continue
        family = [inference, *(job for job in jobs if job["parent_id"] == inference["job_id"])]
        parts = [(job, *part) for job in family for part in _parts(job, events)]
        whole = sum(seconds for _, _, seconds in parts) or 1.0
        told += [
            Stage(job["job_id"], job["model"], job["peer"], name, round(seconds, 3), seconds / whole)
            for job, name, seconds in parts
        ]
    return told


def _parts(job: Row, events: Sequence[Row]) -> Iterator[tuple[str, float]]:
    """Yield the stages of one job: before a worker had it, those that it timed, and the rest until the end."""
    own = [event for event in events if event["job_id"] == job["job_id"]]
    queued, claimed, ended = (_last(own, f"job.{name}") for name in ("queued", "claimed", "finished"))
    if queued is None or claimed is None or ended is None:
        return
    completed = [event for event in events if event["name"] == "series.complete" and _is_about(event, job)]
    if job["kind"] == "infer" and completed:
        yield SETTLE, completed[-1]["fields"].get("silent", 0.0)
    yield CLAIM, claimed["at"] - queued["at"]
    timed: Mapping[str, float] = ended["fields"].get("seconds", {})
    yield from timed.items()
    yield OTHER, max(ended["at"] - claimed["at"] - sum(timed.values()), 0.0)


def _is_about(event: Row, job: Row) -> bool:
    same_series = event["series_instance_uid"] == job["series_instance_uid"]
    return bool(same_series and event["fields"].get("revision") == job["revision"])


def _last(events: Sequence[Row], name: str) -> Row | None:
    return next((event for event in reversed(events) if event["name"] == name), None)
