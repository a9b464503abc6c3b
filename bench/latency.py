"""From the end of a study's association to the last result stored at the destination, stage by stage."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from bench.measure import Figure
from bench.whole import Stub, Whole, write_ct

_FORWARD = 1.0  # seconds
_SETTLE = 2.0  # seconds: the default, in which the series is read
_LIMIT = 1.0  # seconds, for everything but the settle time and the model


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Send a CT of 300 slices of 512 x 512 `rounds` times, each as another study, and read the ledger's stages."""
    slices = 30 if quick else 300
    with tempfile.TemporaryDirectory(prefix="bench-latency-") as scratch:
        folder = Path(scratch)
        told: dict[str, list[float]] = {}
        with Whole(folder / "whole", Stub("stub", _FORWARD), settle=_SETTLE) as whole:
            for number in range(rounds):
                whole.send(write_ct(folder / str(number), slices=slices, side=512, number=number))
                whole.delivered(number + 1)
            for stage in whole.stages():
                name = f"deliver: {stage.name}" if stage.peer else stage.name
                told.setdefault(name, []).append(stage.seconds)
    own = [name for name in told if name != "settle"]
    return [
        Figure(
            name=f"latency: {slices} slices, without settle time and forward time",
            unit="s",
            ours=statistics.median(map(sum, zip(*(told[name] for name in own), strict=True))) - _FORWARD,
            limit=_LIMIT,
            note=f"a stub model that sleeps {_FORWARD:g} s in a contained process; settle {_SETTLE:g} s",
        ),
        *(Figure(name=f"latency: {name}", unit="s", ours=statistics.median(told[name])) for name in told),
    ]
