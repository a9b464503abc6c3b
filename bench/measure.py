"""A figure, and how it is come by: all cases take turns, several rounds, and the medians count.

Every other module of this package has one way in: `def figures(*, rounds: int, quick: bool) -> list[Figure]`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

OURS = "dicom-node"
"""The name of the node's own case in `alternate`."""

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing measured, of the node and of its peers in the same run.

    `bars` are the ratios ours/theirs that are asked for, by peer: at least so much where higher is better, at most
    where lower is. `limit` bounds our own figure in the same sense. `spread` is (lowest, highest) of each case.
    """

    name: str  # such as "receive: 8 associations"
    unit: str
    ours: float
    others: Mapping[str, float] = field(default_factory=dict)
    better: Literal["higher", "lower"] = "lower"
    bars: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""  # what a reader must know to understand the figure

    def ratio(self, other: str) -> float:
        """Return ours/theirs; infinite where theirs is nothing."""
        theirs = self.others[other]
        return self.ours / theirs if theirs else float("inf")

    def meets(self, other: str) -> bool | None:
        """Return whether the bar against a peer is met; None where there is none."""
        bar = self.bars.get(other)
        return None if bar is None else self._holds(self.ratio(other), bar)

    @property
    def within_limit(self) -> bool | None:
        """Return whether our own figure keeps its limit; None where there is none."""
        return None if self.limit is None else self._holds(self.ours, self.limit)

    def _holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.better == "higher" else value <= bound


class Absent(Exception):
    """A peer is not installed; the message says what would bring it."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What several rounds of one case gave."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Return the lowest and the highest."""
        return min(self.values), max(self.values)


def alternate(
    cases: Mapping[str, Callable[[], float | Mapping[str, float]]], rounds: int
) -> dict[str, dict[str, Measured]]:
    """Run A B C, A B C, ...; return by case and quantity what the rounds gave.

    A case returns one number (its quantity is then called "") or several by name. One that raises `Absent` in
    its first round is left out.
    """
    gathered: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for _ in range(rounds):
        for name in list(gathered):
            try:
                got = cases[name]()
            except Absent:
                del gathered[name]
                continue
            for quantity, value in (got if isinstance(got, Mapping) else {"": got}).items():
                gathered[name].setdefault(quantity, []).append(value)
    return {
        name: {quantity: Measured(tuple(values)) for quantity, values in each.items()}
        for name, each in gathered.items()
    }


def figure(
    measured: Mapping[str, Mapping[str, Measured]],
    name: str,
    unit: str,
    *,
    quantity: str = "",
    better: Literal["higher", "lower"] = "lower",
    bars: Mapping[str, float] | None = None,
    limit: float | None = None,
    note: str = "",
) -> Figure:
    """Return one quantity of what `alternate` gave as a Figure; the node's own case is called OURS."""
    found = {case: each[quantity] for case, each in measured.items() if quantity in each}
    return Figure(
        name=name,
        unit=unit,
        ours=found[OURS].median,
        others={case: each.median for case, each in found.items() if case != OURS},
        better=better,
        bars=bars or {},
        limit=limit,
        spread={case: each.spread for case, each in found.items()},
        note=note,
    )


def seconds(do: Callable[[], object]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def processor_seconds(do: Callable[[], object]) -> float:
    """Return the processor time of something in this process, all its threads together."""
    began = time.process_time()
    do()
    return time.process_time() - began


def processor_time(pid: int) -> float:
    """Return the seconds of processor time (user and system) of a process and its descendants, dead ones included."""
    return sum(_ticks(each) for each in _tree(pid)) / _TICK


@contextmanager
def resident_growth(pid: int) -> Iterator[Callable[[], float]]:
    """Give a function that says by how many MB the resident memory of a process and its descendants has grown at most.

    Each process' peak (VmHWM) is set back first, so what it needed earlier does not hide anything.
    """
    before = {each: _status(each, "VmRSS") for each in _tree(pid)}
    for each in before:
        Path(f"/proc/{each}/clear_refs").write_text("5")
    yield lambda: sum(max(0, _status(each, "VmHWM") - resident) for each, resident in before.items()) / 1000


def _tree(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, rest = [], [pid]
    while rest:
        found.append(rest.pop())
        rest += children.get(found[-1], [])
    return found


def _stat(pid: int) -> list[str]:
    """Return what follows the name in /proc/PID/stat: state, parent, ...; nothing where the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _ticks(pid: int) -> int:
    fields = _stat(pid)
    return sum(int(value) for value in fields[11:15]) if fields else 0  # utime, stime, cutime, cstime


def _status(pid: int, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)
