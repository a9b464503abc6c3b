"""`python -m bench PART ...`: measure, print ratios first, write RESULTS.md."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import report
from bench.gate import judge
from bench.measure import Absent, Figure

PARTS = {
    "receive": "bench.receive",
    "load": "bench.loading",
    "encode": "bench.encoding",
    "latency": "bench.latency",
    "backlog": "bench.backlog",
    "scale": "bench.scale",
    "fleet": "bench.fleet",
    "capacity": "bench.capacity",
}
"""Each is a module with `figures(*, rounds, quick) -> list[Figure]`."""

_HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def measure(
    parts: Annotated[list[str], typer.Argument(help=f"{', '.join(PARTS)}, all, or gate")],
    rounds: Annotated[int, typer.Option(help="how often every case has its turn")] = 5,
    quick: Annotated[bool, typer.Option(help="smaller inputs, no RESULTS.md: to see that it works")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Measure the node beside its peers. A peer that is not installed is left out."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    wanted = list(PARTS) if parts == ["all"] else parts
    console = Console(stderr=as_json)
    if wanted == ["gate"]:
        raise typer.Exit(_gate(console))
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(PARTS)}, all, gate")
    found = [_part(name, rounds, quick, console) for name in wanted]
    if as_json:
        print(json.dumps([asdict(part) for part in found if part is not None], indent=1))


def _part(name: str, rounds: int, quick: bool, console: Console) -> report.Part | None:
    if importlib.util.find_spec(PARTS[name]) is None:
        console.print(f"{name}: not part of this checkout")
        return None
    began = os.getloadavg()[0]
    try:
        figures: list[Figure] = importlib.import_module(PARTS[name]).figures(rounds=rounds, quick=quick)
    except Absent as error:
        console.print(f"{name}: left out: {error}")
        return None
    part = report.Part(
        name=name,
        command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%d %H:%M %Z"),
        commit=report.commit(_HERE),
        rounds=rounds,
        load=(began, os.getloadavg()[0]),
        figures=tuple(figures),
    )
    _show(part, console)
    if not quick:
        console.print(f"written: {report.write_part(part, _HERE)}")
    return part


def _show(part: report.Part, console: Console) -> None:
    table = Table("what", "against", "ratio", "asked for", "", title=part.name)
    for row in report.ratios([part]):
        table.add_row(*row)
    for figure in part.figures:
        if not figure.others:
            table.add_row(figure.name, "", "", "", f"{figure.ours:.4g} {figure.unit}")
    console.print(table)


def _gate(console: Console) -> int:
    """Return 1 where a bound of `bounds.toml` is broken."""
    verdicts = judge()
    for verdict in verdicts:
        console.print(str(verdict))
    return 0 if all(verdict.held for verdict in verdicts) else 1


if __name__ == "__main__":
    app()
