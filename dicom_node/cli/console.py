"""What the commands share on a terminal: tables, times, JSON, the settings option."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dicom_node.config import Settings, load
from dicom_node.errors import SettingsError
from dicom_node.ledger import Ledger

SettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", "-s", help="node.toml; by default ./node.toml, then /etc/dicom-node/node.toml."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

console = Console()


def print_json(value: Any) -> None:
    """Print `value` as JSON, plainly: no colours, no line breaks inside values."""
    typer.echo(json.dumps(value, indent=2, default=str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table; columns whose title ends in a space and `#` are numbers, aligned right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", show_edge=False)
    for column in columns:
        made.add_column(column.removesuffix(" #"), justify="right" if column.endswith(" #") else "left")
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


def existing_ledger(settings: Settings) -> Ledger:
    """Open the ledger that a node made; raise SettingsError where none has run with these settings yet."""
    if not settings.node.ledger and not (settings.node.storage / "ledger.sqlite3").exists():
        raise SettingsError(
            f"no ledger in {settings.node.storage}: no node has run with these settings (see --settings)"
        )
    ledger = Ledger(settings.ledger_url)
    ledger.require_schema()
    return ledger


def settings_from(path: Path | None) -> Settings:
    """Read the settings."""
    return load(path)


def clock(seconds: float | None) -> str:
    """Return a local time of day, with the date where it is not today's."""
    if seconds is None:
        return ""
    moment = time.localtime(seconds)
    today = time.localtime()[:3] == moment[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", moment)


def ago(seconds: float | None) -> str:
    """Return `12 s`, `3 min`, `5 h` or `2 d`."""
    if seconds is None:
        return ""
    age = max(0.0, time.time() - seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if age >= size:
            return f"{age / size:.0f} {unit}"
    return f"{age:.0f} s"


def megabytes(size: int) -> str:
    """Return a size in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
