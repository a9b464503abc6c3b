"""Verify: read everything that is kept again, and say what is wrong."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dicom_node.cli.console import (
    JsonOption,
    SettingsOption,
    console,
    existing_ledger,
    print_json,
    settings_from,
    table,
)
from dicom_node.inspection import REMEDIES, Fault, Inspection, Problem

_NICE = 15  # the node's own work comes first
_SHOWN = 20  # of each fault


def verify(
    study: Annotated[str | None, typer.Option(help="Only this Study Instance UID.")] = None,
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every instance and result again, and compare it with the ledger's digests; the node may run meanwhile.

    Exits with 1 where something is wrong.
    """
    loaded = settings_from(settings)
    ledger = existing_ledger(loaded)
    os.nice(_NICE)
    total = ledger.inventory.count(study)
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=as_json, transient=True) as progress:
        task = progress.add_task("", total=total)
        inspection = Inspection(ledger, loaded.node.storage)
        problems = list(inspection.problems(study, read=lambda: progress.advance(task)))
    if as_json:
        print_json({"files": total, "problems": [_plain(problem) for problem in problems]})
    else:
        _show(total, problems)
    raise typer.Exit(1 if problems else 0)


def _plain(problem: Problem) -> dict[str, str | None]:
    return {
        "fault": problem.fault.value,
        "path": problem.path,
        "study_instance_uid": problem.study_instance_uid,
        "detail": problem.detail,
    }


def _show(total: int, problems: Sequence[Problem]) -> None:
    by_fault: dict[Fault, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_fault[problem.fault].append(problem)
    for fault, some in by_fault.items():
        rows = [[problem.path, problem.detail] for problem in some[:_SHOWN]]
        if len(some) > _SHOWN:
            rows.append([f"and {len(some) - _SHOWN} more: --json lists all", ""])
        console.print(table(f"{len(some)} {fault}: {REMEDIES[fault]}", ["file", "what"], rows))
        console.print()
    verdict = f"[red]{len(problems)} problems[/red]" if problems else "[green]all as the ledger says[/green]"
    console.print(f"{total} files read: {verdict}")
