"""A backlog of studies: how much of the time the model is at work, and what one worker and two get done in an hour."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.measure import Figure
from bench.whole import Stub, Whole, write_ct

_FORWARD = 2.0  # seconds
_BUSY = 0.9
_SLICES = 60


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Send studies faster than they are worked on, once with one worker and once with two; read the ledger."""
    studies = 4 if quick else max(8, 2 * rounds)
    one, two = (_run(studies, workers) for workers in (1, 2))
    busy = "the model is a stub that sleeps: it needs no processor, as if it were on a GPU"
    return [
        Figure(
            name="backlog: share of the time in which the model is at work",
            unit="",
            ours=busy_share(one),
            better="higher",
            limit=_BUSY,
            note=f"{studies} studies of {_SLICES} slices, {_FORWARD:g} s each; {busy}",
        ),
        Figure(name="backlog: one worker", unit="studies/h", ours=_an_hour(one), better="higher", note=busy),
        Figure(
            name="backlog: two workers",
            unit="studies/h",
            ours=_an_hour(two),
            others={"one worker": _an_hour(one)},
            better="higher",
            bars={"one worker": 1.8},
            note=f"two devices that do not exist: {busy}",
        ),
        *(
            Figure(name=f"backlog: {stage}", unit="s", ours=sum(each["seconds"][stage] for each in one) / len(one))
            for stage in one[0]["seconds"]
        ),
    ]


def _run(studies: int, workers: int) -> Sequence[Mapping[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="bench-backlog-") as scratch:
        folder = Path(scratch)
        made = [write_ct(folder / str(n), slices=_SLICES, side=512, number=n) for n in range(studies)]
        node = f'device = "cpu"\nworkers = {workers}'
        with Whole(folder / "whole", Stub("stub", _FORWARD), settle=0.1, node=node) as whole:
            for series in made:
                whole.send(series)
            whole.delivered(studies)
            return whole.finished()


def busy_share(finished: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the time, from the first model's begin to the last one's end, in which one was at work.

    `finished` are the `began` and `seconds` of each inference of one worker, out of the ledger.
    """
    began = [each["began"]["model"] for each in finished]
    ended = [each["began"]["model"] + each["seconds"]["model"] for each in finished]
    return float(sum(each["seconds"]["model"] for each in finished) / (max(ended) - min(began)))


def _an_hour(finished: Sequence[Mapping[str, Any]]) -> float:
    """Return how many studies an hour leave the model, by the time between the first and the last."""
    ended = sorted(each["began"]["model"] + each["seconds"]["model"] for each in finished)
    began = min(each["began"]["model"] for each in finished)
    return float(3600.0 * len(ended) / (ended[-1] - began))
