"""Ask what is going on, and what happened."""

from __future__ import annotations

import getpass
import shutil
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from dicom_node.audit import Audit
from dicom_node.cli.console import (
    JsonOption,
    SettingsOption,
    ago,
    clock,
    console,
    existing_ledger,
    megabytes,
    print_json,
    settings_from,
    table,
)
from dicom_node.errors import SettingsError
from dicom_node.ledger import Ledger
from dicom_node.ledger.history import Row
from dicom_node.lifecycle import State
from dicom_node.timing import Stage, stages

_TIMES = frozenset({"seconds", "began"})  # what the table of stages shows
_TELLING = 0.05  # of the progress: below it no pace can be told


def status(
    settings: SettingsOption = None,
    limit: Annotated[int, typer.Option(help="How many jobs to show.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show what was received, what is queued, running and done, and what needs a look.

    Exits with 1 where a job has failed.
    """
    loaded = settings_from(settings)
    ledger = existing_ledger(loaded)
    counts = ledger.history.counts()
    jobs = ledger.history.recent_jobs(limit=limit)
    free = shutil.disk_usage(loaded.node.storage).free
    failed = any(State.FAILED in states for states in counts["jobs"].values())
    if as_json:
        timed = [{**job, "remaining_seconds": remaining(job, time.time())} for job in jobs]
        print_json({**counts, "free_bytes": free, "recent_jobs": timed})
    else:
        _show_status(counts, jobs, free)
    raise typer.Exit(1 if failed else 0)


def _show_status(counts: Row, jobs: list[Row], free: int) -> None:
    console.print(
        f"received {counts['instances']} instances in {counts['series']} series, {megabytes(counts['bytes'])}; "
        f"free {megabytes(free)}\n"
    )
    states = [state.value for state in State]
    rows = [[kind, *(number.get(state, "") for state in states)] for kind, number in sorted(counts["jobs"].items())]
    console.print(table("Jobs", ["kind", *(f"{state} #" for state in states)], rows))
    console.print()
    columns = ["job #", "what", "state", "progress #", "attempt #", "since", "study", "why"]
    console.print(table("Latest", columns, [_job_row(row) for row in jobs]))


def _job_row(row: Row) -> list[Any]:
    what = f"{row['model']} to {row['peer']}" if row["peer"] else f"{row['model']} revision {row['revision']}"
    moment = row["ended_at"] or row["started_at"] or row["created_at"]
    progress = f"{row['progress']:.0%}" if row["state"] == State.RUNNING else ""
    left = remaining(row, time.time())
    progress += f", {left:.0f} s left" if left is not None else ""
    why = ": ".join(part for part in (row["reason"], row["detail"]) if part)
    study = row["study_instance_uid"]
    return [row["job_id"], what, row["state"], progress, row["attempts"], ago(moment), study, why]


def remaining(row: Row, now: float) -> float | None:
    """Return the seconds that a running job still needs at its present pace; None where nobody can tell yet."""
    part, started = row["progress"], row["started_at"]
    if row["state"] != State.RUNNING or started is None or part < _TELLING:
        return None
    return max(now - float(started), 0.0) * (1 - float(part)) / float(part)


def history(
    what: Annotated[str | None, typer.Argument(help="Study or Series Instance UID, or the number of a job.")] = None,
    settings: SettingsOption = None,
    limit: Annotated[int, typer.Option(help="How many events, where no study is named.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Tell the story of a study, a series or a job: every event, in order, with reasons and times."""
    ledger = existing_ledger(settings_from(settings))
    events = _events(ledger, what, limit)
    if what and not events:
        raise SettingsError(f"nothing is known of {what}")
    about = what if what and not what.isdigit() else None
    jobs = ledger.history.jobs_of(about) if about else ledger.history.family_of(int(what)) if what else []
    results = ledger.history.results_of(about) if about else []
    timed = stages(jobs, events)
    if as_json:
        print_json({"events": events, "jobs": jobs, "results": results, "stages": [asdict(stage) for stage in timed]})
        return
    console.print(table("Events", ["at", "event", "job #", "details"], [_event_row(row) for row in events]))
    if timed:
        console.print()
        columns = ["job #", "what", "stage", "seconds #", "share #"]
        console.print(table("Time", columns, [_stage_row(stage) for stage in timed]))
    if results:
        console.print()
        columns = ["job #", "kind", "form", "model", "revision #", "SOP Instance UID", "file"]
        keys = ["job_id", "kind", "form", "model", "revision", "sop_instance_uid", "path"]
        rows = [[row[key] or "" for key in keys] for row in results]
        console.print(table("Results", columns, rows))


def _stage_row(stage: Stage) -> list[Any]:
    what = f"{stage.model} to {stage.peer}" if stage.peer else stage.model
    return [stage.job_id, what, stage.name, f"{stage.seconds:.3f}", f"{stage.share:.0%}"]


def audit(
    settings: SettingsOption = None,
    limit: Annotated[int, typer.Option(help="How many lines.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Show the audit trail: what was received, sent and deleted, who was not let in; that you looked is in it as well.

    Messages to an audit collector that it has not read yet are counted.
    """
    loaded = settings_from(settings)
    ledger = existing_ledger(loaded)
    trail = Audit(loaded, ledger)
    lines, waiting = ledger.history.audit(limit=limit), trail.waiting()
    trail.used(getpass.getuser())
    if as_json:
        print_json({"lines": lines, "waiting": waiting})
        return
    columns = ["at", "event", "outcome", "from", "to", "instances #", "study", "details"]
    console.print(table("Audit trail", columns, [_audit_row(line) for line in lines]))
    if waiting is not None:
        console.print(f"\n{waiting} message(s) wait for {loaded.audit.collector}")


def _audit_row(line: Row) -> list[Any]:
    fields = dict(line["fields"])
    event = " ".join(filter(None, (line["name"].removeprefix("audit.").replace("_", " "), fields.pop("type", ""))))
    outcome = "success" if fields.pop("indicator") == 0 else "failure"
    shown = [fields.pop(key, "") for key in ("from", "to", "instances")]
    details = ", ".join(f"{key} {value}" for key, value in fields.items() if key not in ("event", "action"))
    return [clock(line["at"]), event, outcome, *shown, line["study_instance_uid"], details]


def _events(ledger: Ledger, what: str | None, limit: int) -> list[Row]:
    if what is None:
        return ledger.history.recent_events(limit=limit)
    return ledger.history.events_of_job(int(what)) if what.isdigit() else ledger.history.events_of(what)


def _event_row(row: Row) -> list[Any]:
    details = ", ".join(f"{key} {_plain(value)}" for key, value in row["fields"].items() if key not in _TIMES)
    return [clock(row["at"]), row["name"], row["job_id"], details]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {item}" for key, item in value.items()) + ")"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
