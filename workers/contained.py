"""The process that one contained model lives in: `python -m workers.contained DESCRIPTOR`, started by `workers.cell`.

It reads orders as lines of JSON on standard input and answers on the descriptor. It shuts itself in before it
imports anything that starts threads; what is imported above that must stay small.
"""

from __future__ import annotations

import json
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from workers.containment import Cell, Walls, confine, die_with_parent

Say = Callable[[dict[str, Any]], None]


def main() -> None:
    """Serve one model until standard input ends."""
    say = _speaker(int(sys.argv[1]))
    orders = (json.loads(line) for line in sys.stdin)
    first = next(orders)
    die_with_parent(first["parent"])
    try:
        confine(_cell(first["cell"]), Walls(**first["walls"]))
    except OSError as error:
        say({"said": "refused", "message": f"could not be contained: {error.strerror or error}"})
        return
    _attempt(say, lambda: _serve(first, orders, say))


class _Stopped(BaseException):
    """The worker wants no answer any more; no model takes it for an error of its own."""


def _loaded(first: dict[str, Any]) -> Any:
    import importlib

    from dicom_node.catalogue import read_model

    folder = Path(first["folder"])
    manifest = read_model(folder).manifest
    runtime: Any = importlib.import_module(f"workers.runtimes.{manifest.runtime}")
    return runtime.load(manifest, folder, first["device"])


def _serve(first: dict[str, Any], orders: Iterator[dict[str, Any]], say: Say) -> None:
    """Load the model, then predict for every further order."""
    from dicom_node import heap

    with heap.at_rest():
        model = _loaded(first)
    heap.settle()
    from workers.passing import read_grid, write_prediction

    say({"said": "ready"})
    given, work = Path(first["given"]), Path(first["work"])

    def progress(part: float) -> None:
        say({"said": "progress", "part": float(part)})
        if select.select([sys.stdin], [], [], 0)[0]:  # nothing but "stop" comes while a model is at work
            sys.stdin.readline()
            raise _Stopped

    def predict(order: dict[str, Any]) -> None:
        several = order.get("several")
        try:
            if several is None:
                prediction = model(read_grid(order, given), progress)
                say({"said": "answer", **write_prediction(prediction, work)})
                return
            grids = [read_grid(one, given / str(number)) for number, one in enumerate(several)]
            answers = enumerate(model.many(grids, progress))
        except _Stopped:
            say({"said": "stopped"})
            return
        say({"said": "answers", "several": [write_prediction(one, work / str(number)) for number, one in answers]})

    for order in orders:
        if "stop" not in order:  # or it came too late: the answer was on its way
            _attempt(say, lambda order=order: predict(order))  # type: ignore[misc]


def _attempt(say: Say, act: Callable[[], None]) -> None:
    """Act; say what it ended with where it fails, and never what a message of a library quotes."""
    from dicom_node.errors import NodeError, NotApplicable

    try:
        act()
    except NotApplicable as answer:
        say({"said": "not_applicable", "reason": str(answer.reason), "detail": answer.detail})
    except Exception as error:  # whatever a model raises
        if _is_for_memory(error):
            say({"said": "memory"})
            return
        if isinstance(error, NodeError):
            say({"said": "refused", "message": str(error)})
            return
        places = [f"{at.filename}:{at.lineno} {at.name}" for at in traceback.extract_tb(error.__traceback__)]
        say({"said": "failed", "error": type(error).__name__, "places": places[-8:]})


def _is_for_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it was raised from, is that there is no more memory: libraries wrap it."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _speaker(descriptor: int) -> Say:
    def say(message: dict[str, Any]) -> None:
        content = memoryview(json.dumps(message).encode() + b"\n")
        while content:
            content = content[os.write(descriptor, content) :]

    return say


def _cell(told: dict[str, Any]) -> Cell:
    return Cell(
        tuple(told["reads"]), tuple(told["lists"]), tuple(told["writes"]), int(told["memory"]), int(told["files"])
    )


if __name__ == "__main__":
    main()
