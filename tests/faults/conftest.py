"""Real processes with a shim between them and their disk, a scripted destination, small series, a fast model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dicom_node.catalogue import default_folder
from dicom_node.demo.phantom import make_thorax, write_series
from tests.acceptance.stand import NodeProcess
from tests.faults.archive import Archive
from tests.faults.scanner import Image
from tests.faults.shim import Shim, build

SMALL = {"slices": 20, "size": (40, 52), "spacing": (12.0, 8.1, 6.9), "noise": 0.0}
MODEL = "ct_lung"


def write_model(root: Path) -> Path:
    """Write the folder of a model that takes the small series: `ct_lung` without its limits of spacing."""
    manifest = (default_folder() / MODEL / "model.toml").read_text()
    for limit in ("frames = { min = 12 }", "in_plane_spacing = { min = 0.2, max = 2.5 }"):
        assert limit in manifest
        manifest = manifest.replace(limit, "")
    (root / MODEL).mkdir(parents=True)
    (root / MODEL / "model.toml").write_text(manifest)
    return root


def write_studies(folder: Path, count: int, *, first: int = 500) -> list[list[Image]]:
    """Write small studies of one series each; return what there is to send."""
    return [
        [Image.of(path) for path in write_series(make_thorax(seed=first + n, **SMALL), folder / str(n))]
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """pynetdicom as in the node: a destination that is away is no error of the test."""
    import logging

    monkeypatch.setattr(logging.getLogger("pynetdicom"), "level", logging.CRITICAL)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def studies(tmp_path_factory) -> list[list[Image]]:
    return write_studies(tmp_path_factory.mktemp("studies"), 4)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The shim, compiled."""
    return build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def archive() -> Iterator[Archive]:
    made = Archive().start()
    yield made
    made.stop()


@pytest.fixture
def node(tmp_path, models, archive) -> Iterator[Callable[..., NodeProcess]]:
    """Makes nodes and ends them, with everything that they started."""
    made: list[NodeProcess] = []

    def make(*, node: str = "", **settings) -> NodeProcess:
        process = NodeProcess(
            tmp_path / f"node{len(made)}",
            pacs_port=archive.port,
            node=f'models = "{models}"\n{node}',
            **{"lease": 20.0, **settings},
        )
        made.append(process)
        return process

    yield make
    for process in made:
        process.end()


@pytest.fixture
def shimmed(node, library, archive) -> Callable[..., tuple[NodeProcess, Shim]]:
    """Makes nodes whose processes run under a shim."""

    def make(*, journal: bool = False, **settings) -> tuple[NodeProcess, Shim]:
        running = node(**settings)
        shim = Shim(library, running.folder / "shim", root=running.folder / "storage", journal=journal)
        running.environment.update(shim.environment)
        archive.ticks = lambda: shim.count
        return running, shim

    return make
