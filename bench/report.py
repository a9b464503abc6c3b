"""RESULTS.md: ratios first, then the figures, then the machine; kept as JSON beside it, part by part."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.measure import OURS, Figure

_PACKAGES = ("pydicom", "pynetdicom", "highdicom", "numpy", "torch", "sqlalchemy", "dcmqi")
_PROGRAMS = {
    "DCMTK": ("storescp", "--version"),
    "Orthanc": ("Orthanc", "--version"),
    "PostgreSQL": ("psql", "--version"),
    "Redis": ("redis-server", "--version"),
}


@dataclass(frozen=True, slots=True)
class Part:
    """What one module measured, and in which circumstances."""

    name: str
    command: str
    date: str
    commit: str
    rounds: int
    load: tuple[float, float]  # the machine's load average when it began and when it ended
    figures: tuple[Figure, ...]


def write_part(part: Part, folder: Path) -> Path:
    """Put a part in the place of its earlier self in `results.json`, write RESULTS.md anew and return its path."""
    kept = folder / "results.json"
    parts = read_parts(kept)
    parts[part.name] = part
    machine = describe_machine(folder)
    content = {"machine": machine, "parts": [asdict(each) for each in parts.values()]}
    kept.write_text(json.dumps(content, indent=1) + "\n")
    results = folder / "RESULTS.md"
    results.write_text(render(list(parts.values()), machine))
    return results


def read_parts(path: Path) -> dict[str, Part]:
    """Read `results.json`; nothing where there is none."""
    if not path.exists():
        return {}
    return {each["name"]: _part(each) for each in json.loads(path.read_text())["parts"]}


def _part(values: Mapping[str, Any]) -> Part:
    figures = tuple(
        Figure(**{**each, "spread": {case: tuple(ends) for case, ends in each["spread"].items()}})
        for each in values["figures"]
    )
    return Part(**{**values, "load": tuple(values["load"]), "figures": figures})


# -- as text --------------------------------------------------------------------------------------------------------


def render(parts: Sequence[Part], machine: Mapping[str, str]) -> str:
    """Return the whole of RESULTS.md."""
    lines = ["# What the node costs, beside what else a user would run", ""]
    lines += [
        "Made by `make bench`; every ratio is within one run, the cases took turns, medians. `python -m bench --help`"
    ]
    lines += ["says how to make one part again. A ratio is ours divided by theirs.", "", "## Ratios", ""]
    lines += _table(("what", "against", "ratio", "asked for", ""), ratios(parts))
    limits = list(_limits(parts))
    if limits:
        lines += ["", "## Limits", "", *_table(("what", "measured", "asked for", ""), limits)]
    for part in parts:
        lines += ["", f"## {part.name}", "", _circumstances(part), "", *_figures(part)]
    lines += ["", "## Machine and versions", "", *_table(("", ""), machine.items())]
    return "\n".join(lines) + "\n"


def ratios(parts: Iterable[Part]) -> Iterable[Sequence[str]]:
    """Give each figure against each peer: what, against whom, ratio, what is asked for, whether it is held."""
    for part in parts:
        for figure in part.figures:
            for other, theirs in figure.others.items():
                if not theirs:
                    continue  # nobody has a ratio to nothing
                yield (
                    figure.name,
                    other,
                    _number(figure.ratio(other)),
                    _asked(figure, other),
                    _mark(figure.meets(other)),
                )


def _limits(parts: Iterable[Part]) -> Iterable[Sequence[str]]:
    for part in parts:
        for figure in part.figures:
            if figure.limit is not None:
                sign = "at least" if figure.better == "higher" else "at most"
                asked = f"{sign} {_number(figure.limit)}"
                yield figure.name, f"{_number(figure.ours)} {figure.unit}", asked, _mark(figure.within_limit)


def _asked(figure: Figure, other: str) -> str:
    if other not in figure.bars:
        return ""
    return f"{'at least' if figure.better == 'higher' else 'at most'} {_number(figure.bars[other])}"


def _mark(held: bool | None) -> str:
    return {None: "", True: "held", False: "**missed**"}[held]


def _circumstances(part: Part) -> str:
    load = " to ".join(f"{each:.1f}" for each in part.load)
    return f"`{part.command}`, {part.date}, commit {part.commit}, {part.rounds} rounds, load average {load}"


def _figures(part: Part) -> list[str]:
    cases = [OURS, *dict.fromkeys(other for figure in part.figures for other in figure.others)]
    rows = []
    for figure in part.figures:
        values = {OURS: figure.ours, **figure.others}
        name = f"{figure.name}<br>{figure.note}" if figure.note else figure.name
        rows.append([name, figure.unit, *(_value(figure, case, values.get(case)) for case in cases)])
    return _table(("what", "unit", *cases), rows)


def _value(figure: Figure, case: str, value: float | None) -> str:
    if value is None:
        return ""
    lowest, highest = figure.spread.get(case, (value, value))
    spread = f" ({_number(lowest)}–{_number(highest)})" if lowest != highest else ""
    return f"{_number(value)}{spread}"


def _number(value: float) -> str:
    """Return three digits that count."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# -- the machine ----------------------------------------------------------------------------------------------------


def describe_machine(folder: Path) -> dict[str, str]:
    """Return processor, memory, disk, kernel and versions, as far as they can be found."""
    processor = _first("/proc/cpuinfo", r"model name\s*: (.*)")
    memory = int(_first("/proc/meminfo", r"MemTotal:\s*(\d+)") or 0) / 1e6
    facts = {
        "processor": f"{processor}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GB",
        "disk": _disk(Path(os.environ.get("BENCH_SCRATCH", "/var/tmp"))),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    return facts | {name: found for name, command in _PROGRAMS.items() if (found := _said(command))}


def commit(folder: Path) -> str:
    """Return the commit of the checkout that `folder` is in, or "unknown"."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _first(path: str, pattern: str) -> str:
    try:
        found = re.search(pattern, Path(path).read_text())
    except OSError:
        return ""
    return found.group(1) if found else ""


def _disk(folder: Path) -> str:
    """Return file system and options of the mount that a folder is on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    under = [each for each in mounts if folder.is_relative_to(each[1])]
    device, _, kind, options = max(under, key=lambda each: len(each[1]))[:4]
    return f"{kind} on {device} ({options})"


def _said(command: Sequence[str]) -> str:
    executable = shutil.which(command[0], path=f"/usr/sbin:/usr/bin:{os.environ.get('PATH', '')}")
    if executable is None:
        return ""
    said = subprocess.run([executable, *command[1:]], capture_output=True, text=True, check=False)
    found = re.search(r"\d+(\.\d+)+", said.stdout)
    return found.group(0) if found else ""
