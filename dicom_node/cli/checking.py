"""`models check`: is a model folder what it says, and does it say on its example what it should?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dicom_node.catalogue import ModelFolder, read_model, suggestion
from dicom_node.cli.console import JsonOption, SettingsOption, console, print_json, settings_from, table
from dicom_node.config import Settings
from dicom_node.errors import NodeError, SettingsError

Line = dict[str, Any]


def check(
    name: Annotated[str, typer.Argument(help="A model of the settings' models folder, or a path to its folder.")],
    series: Annotated[
        Path | None, typer.Option(help="Run it on the DICOM files in this folder instead of its example.")
    ] = None,
    run: Annotated[
        bool, typer.Option(help="Run the example; --no-run looks at the manifest and the files only.")
    ] = True,
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a model: manifest, codes, files and digests; then run its example and compare with what it expects.

    Exits with 1 where something is wrong, each in a line that names the key.
    """
    loaded = settings_from(settings)
    if as_json:
        lines = list(_lines(loaded, name, series, run))
        print_json(lines)
    else:
        with console.status(f"{name}: reading, loading, running its example"):
            lines = list(_lines(loaded, name, series, run))
        rows = [[line["what"], line["expected"], _verdict(line)] for line in lines]
        console.print(table(f"Model {name}", ["what", "expected", "found"], rows))
    raise typer.Exit(0 if all(line["right"] for line in lines) else 1)


def folder_of(settings: Settings, name: str) -> Path:
    """Return the folder of a model by its name or path; raise SettingsError where there is none."""
    if (Path(name) / "model.toml").is_file():
        return Path(name).absolute()
    folder = settings.node.models / name
    if not (folder / "model.toml").is_file():
        known = [path.parent.name for path in settings.node.models.glob("*/model.toml")]
        raise SettingsError(f'no model "{name}" in {settings.node.models}{suggestion(name, known)}')
    return folder


def _lines(settings: Settings, name: str, series: Path | None, run: bool) -> Iterator[Line]:
    folder = folder_of(settings, name)
    try:
        found = read_model(folder)
    except NodeError as error:
        yield _line("manifest", "", str(error), False)
        return
    yield _line("manifest", "", f"{found.manifest.title} {found.manifest.version}, {found.manifest.runtime}", True)
    yield from _codes(found)
    if run:
        yield from _examined(folder, series, settings.node.device)


def _codes(found: ModelFolder) -> Iterator[Line]:
    from dicom_node.codes import fault  # here: it reads every code that DICOM defines

    faults = [(key, fault(entry)) for key, entry in found.manifest.codes()]
    for key, problem in faults:
        if problem:
            yield _line(key, "a code of DICOM's lists", problem, False)
    if not any(problem for _, problem in faults):
        yield _line("codes", "", f"{len(faults)}, all in DICOM's lists", True)


def _examined(folder: Path, series: Path | None, device: str) -> Iterator[Line]:
    """Yield what a process of its own says, in which the model is loaded and run as a worker would."""
    command = [sys.executable, "-m", "workers.examining", str(folder), "--device", device]
    command += ["--series", str(series)] if series else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    told, complaint = process.communicate()
    lines = [json.loads(line) for line in told.splitlines()]
    yield from lines
    if process.returncode not in (0, 1) or not lines:
        last = complaint.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
        yield _line("run", "", last[0][:300], False)


def _line(what: str, expected: str, found: str, right: bool) -> Line:
    return {"what": what, "expected": expected, "found": found, "right": right}


def _verdict(line: Line) -> str:
    colour = "green" if line["right"] else "red"
    return f"[{colour}]{escape(line['found'])}[/{colour}]"
