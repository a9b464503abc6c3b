"""The real node, a real PACS, real senders: everything runs as processes and talks over sockets."""

from __future__ import annotations

import pytest

from tests.acceptance.stand import NodeProcess, OrthancProcess, free_port


@pytest.fixture
def orthanc(tmp_path, tool):
    """A real Orthanc with nothing in it."""
    process = OrthancProcess(tool("Orthanc"), tmp_path / "orthanc", dicom_port=free_port(), http_port=free_port())
    process.start()
    yield process
    process.stop()


@pytest.fixture
def node(tmp_path):
    """Makes nodes and ends them, with everything that they started."""
    made: list[NodeProcess] = []

    def make(**settings) -> NodeProcess:
        process = NodeProcess(tmp_path / f"node{len(made)}", **settings)
        made.append(process)
        return process

    yield make
    for process in made:
        process.end()
