"""What the node does, one plain line for each event that a person wants to know of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

_SERIES = {
    "series.opened": "a {modality} series begins to arrive",
    "series.complete": "the series is complete: {reason}",
    "series.reopened": "more of the series arrives: it will be done again (revision {revision})",
    "series.unrouted": "no route wants the series: nothing to do",
    "series.unreadable": "the series cannot be read: {reason}",
    "instance.quarantined": "other bytes under a known SOP Instance UID: kept apart",
}
_JOB = {
    "job.claimed": "begins",
    "job.declined": "does not apply: {reason} ({detail})",
    "job.postponed": "waits {retry_in}: {reason} ({detail})",
    "job.abandoned": "lost its worker and starts again",
    "job.refused": "FAILED: {reason} ({detail})",
    "job.exhausted": "FAILED for good: {reason} ({detail})",
    "job.superseded": "is cancelled: {detail}",
}


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return ""


def line(event: Mapping[str, Any], job: Mapping[str, Any] | None, url: str) -> str | None:
    """Return what to print for one event of the ledger, None where it is of no interest; `url` is the viewer's."""
    name, fields = event["name"], _Known(event["fields"])
    text = _SERIES.get(name, "").format_map(fields)
    if job is not None and name == "job.finished":
        text = f"{what_of(job)} is done"
        if job["kind"] == "deliver":
            text = f"{what_of(job)}: {fields['detail']}\n          see {study_url(url, event['study_instance_uid'])}"
    elif job is not None and name in _JOB:
        text = f"{what_of(job)} {_JOB[name].format_map(fields)}"
    return f"{time.strftime('%H:%M:%S', time.localtime(event['at']))}  {text}" if text else None


def progress(job: Mapping[str, Any]) -> str:
    """Return how far a running job is."""
    return f"          {what_of(job)} {job['progress']:.0%}"


def what_of(job: Mapping[str, Any]) -> str:
    """Return which model runs, or whose results are sent."""
    return job["model"] if job["kind"] == "infer" else f"results of {job['model']} to the PACS"


def study_url(url: str, study_instance_uid: str) -> str:
    """Return the address of one study in the viewer."""
    return f"{url}/viewer?StudyInstanceUIDs={study_instance_uid}"
