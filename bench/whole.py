"""The whole node between a sender and a destination, with models that keep a device busy and compute nothing.

The models are stubs: they sleep for a stated time, window by window, in the process that a model from a file lives in,
and answer a box. So everything around the model's own forward time is real, and that time is known.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import ENVIRONMENT, Dcmtk, Node, find, wait_for
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.timing import Stage, stages

_ROOT = Path(__file__).resolve().parents[1]
_STUB = """
import time
import numpy as np
from workers.prediction import Prediction


def predict(grid, parameters, progress):
    windows = int(parameters["windows"])
    for number in range(windows):
        time.sleep(parameters["seconds"] / windows)
        progress((number + 1) / windows)
    labels = np.zeros(grid.shape, np.uint8)
    labels[tuple(slice(size // 3, 2 * size // 3) for size in grid.shape)] = 1
    return Prediction(labels=labels)
"""
_MANIFEST = """
schema = 1
name = "{name}"
version = "1.0.0"
title = "Stub of {seconds} s"
manufacturer = "bench"
licence = "MIT"
intended_use = "measuring"
runtime = "python"
trusted = true
parameters = {{ entry_point = "stub_of_a_device:predict", seconds = {seconds}, windows = {windows} }}
[inputs.ct]
modality = ["CT"]
[outputs.segments.1]
label = "Box"
category = {{ value = "123037004", scheme = "SCT", meaning = "Anatomical Structure" }}
type = {{ value = "39607008", scheme = "SCT", meaning = "Lung" }}
colour = [240, 230, 140]
"""
_SETTINGS = """
[completion]
settle = {settle}
[peer.PACS]
ae_title = "PACS"
host = "127.0.0.1"
port = {port}
segmentation_type = "LABELMAP"
"""
_ROUTE = """
[[route]]
name = "{name}"
when = {{ calling_ae_title = "{name}" }}
run = "{name}"
send_to = "PACS"
"""


@dataclass(frozen=True, slots=True)
class Stub:
    """A model that sleeps for `seconds` in all, in `windows` equal parts; who sends with its name is routed to it."""

    name: str
    seconds: float
    windows: int = 10


class Whole:
    """A node, DCMTK's storescp as its destination, and what is sent; a context manager."""

    def __init__(self, folder: Path, stub: Stub, *, settle: float, node: str = "") -> None:
        """Keep everything in `folder`; `node` are more lines of that table of node.toml."""
        package = folder / "packages" / "stub_of_a_device"
        model = folder / "models" / stub.name
        for made, file, text in (
            (package, "__init__.py", _STUB),
            (model, "model.toml", _MANIFEST.format(name=stub.name, seconds=stub.seconds, windows=stub.windows)),
        ):
            made.mkdir(parents=True)
            (made / file).write_text(text)
        self.stub = stub
        self._destination = Dcmtk(folder / "destination")
        path = os.pathsep.join([str(_ROOT), str(package.parent)])
        self.node = Node(
            folder / "node",
            node=f'models = "{folder / "models"}"\n{node}',
            settings=_SETTINGS.format(settle=settle, port=self._destination.port) + _ROUTE.format(name=stub.name),
            prefix=["env", f"PYTHONPATH={path}"],
        )

    def __enter__(self) -> Whole:
        """Start both, and wait until the model is loaded and nothing is being imported any more."""
        self._destination.__enter__()
        self.node.__enter__()
        wait_for("the model to be loaded", lambda: "model.loaded" in (self.node.folder / "log").read_text())
        return self

    def __exit__(self, *about: Any) -> None:
        """End both."""
        self.node.__exit__(*about)
        self._destination.__exit__(None, None, None)

    def send(self, folder: Path) -> None:
        """Send a folder's files with DCMTK's storescu on one association."""
        command = [find("storescu", "dcmtk"), "-aet", self.stub.name, "-aec", "DICOM_NODE", "+sd", "127.0.0.1"]
        subprocess.run([*command, str(self.node.port), str(folder)], check=True, env=ENVIRONMENT, timeout=300)

    def delivered(self, number: int, *, seconds: float = 600.0) -> None:
        """Wait until `number` deliveries are done; raise RuntimeError where a job has failed."""

        def done() -> bool:
            jobs = self.node.ledger.history.counts()["jobs"]
            if failed := {kind: states["failed"] for kind, states in jobs.items() if "failed" in states}:
                raise RuntimeError(f"failed: {failed}")
            return bool(jobs.get("deliver", {}).get("done", 0) >= number)

        wait_for(f"{number} deliveries", done, seconds=seconds, every=0.1)

    def stages(self) -> list[Stage]:
        """Return the stages of every job so far, in the order of the inferences."""
        history = self.node.ledger.history
        return [stage for uid in self.studies() for stage in stages(history.jobs_of(uid), history.events_of(uid))]

    def studies(self) -> Sequence[str]:
        """Return the studies that were received."""
        rows = self.node.ledger.history.recent_series(limit=10_000)
        return sorted({str(row["study_instance_uid"]) for row in rows})

    def finished(self) -> Sequence[Mapping[str, Any]]:
        """Return what each finished inference says of itself: the times when its stages began, and their seconds."""
        events = self.node.ledger.history.recent_events(limit=100_000)
        return [row["fields"] for row in events if row["name"] == "job.finished" and "results" in row["fields"]]


def write_ct(folder: Path, *, slices: int, side: int, number: int = 0) -> Path:
    """Write a CT series of `slices` images of `side` x `side` pixels; another `number` is another study."""
    coarse = make_thorax(slices=16, size=(64, 64), spacing=(20.0, 5.5, 5.5), seed=number)
    hu = coarse.hu[np.linspace(0, 15, slices).astype(int)].repeat(side // 64, axis=1).repeat(side // 64, axis=2)
    hu += np.random.default_rng(number).integers(-20, 20, hu.shape, np.int16)
    steps = np.arange(slices)[:, None] * [0.0, 0.0, 1.0]
    write_series(replace(coarse, hu=hu, origins=coarse.origins[0] + steps, spacing=(1.0, 0.7, 0.7)), folder)
    return folder
