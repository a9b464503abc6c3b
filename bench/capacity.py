"""Does the capacity model of CAPACITY.md agree with what is measured? Its constants from two cases, the rest foretold.

The model: a study of n slices costs n (r + w) + s seconds of processor time: r to receive a slice, w and s for the
workers and the nodes, by slice and by study, whatever the number of workers, nodes and waiting studies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import fleet
from bench.fleet import Fleet
from bench.measure import OURS, Figure, Measured, alternate
from bench.receive import scratch

FEW, MANY = 60, 240
"""The slices of the two cases that give the constants."""

FORETOLD: Mapping[str, Fleet] = {
    "120 slices": Fleet(fleet.STUB, slices=120),
    "120 slices, 2 workers": Fleet(fleet.STUB, slices=120, workers=2),
    "120 slices, 2 nodes with a worker each": Fleet(fleet.STUB, slices=120, nodes=2),
}


@dataclass(frozen=True, slots=True)
class Model:
    """Seconds of processor time: for each slice, and for each study."""

    slice: float
    study: float

    def cost(self, slices: int) -> float:
        """Return the processor seconds of a study."""
        return self.slice * slices + self.study


def fitted(few: float, many: float) -> Model:
    """Return the model that gives the costs of the two cases."""
    by_slice = (many - few) / (MANY - FEW)
    return Model(by_slice, few - by_slice * FEW)


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Measure the two cases and those foretold; the ratio of each is measured/foretold."""
    studies = 2 if quick else 6
    cases = {"few": Fleet(fleet.STUB, slices=FEW), "many": Fleet(fleet.STUB, slices=MANY), **FORETOLD}
    with scratch() as folder:
        runs = {name: partial(fleet.run, each, Path(folder, "fleet"), studies) for name, each in cases.items()}
        measured = alternate(runs, 1 if quick else min(rounds, 3))
    cost = {name: each["processor"].median for name, each in measured.items()}
    model = fitted(cost["few"], cost["many"])
    found = [
        Figure("capacity, stub: a slice", "s of processor time", model.slice),
        Figure("capacity, stub: a study", "s of processor time", model.study),
    ]
    for quantity in ("receiving", "nodes", "workers"):
        found += [_share(name, slices, quantity, measured) for name, slices in (("few", FEW), ("many", MANY))]
    for name, each in FORETOLD.items():
        foretold = {"foretold": model.cost(each.slices)}
        spread = {OURS: measured[name]["processor"].spread}
        found.append(Figure(f"capacity, stub, {name}", "s of processor time", cost[name], foretold, spread=spread))
        found.append(Figure(f"capacity, stub, {name}: rate", "studies/hour", measured[name]["rate"].median))
    return found


def _share(name: str, slices: int, quantity: str, measured: Mapping[str, Mapping[str, Measured]]) -> Figure:
    return Figure(
        f"capacity, stub, {slices} slices: {quantity}", "s of processor time", measured[name][quantity].median
    )
