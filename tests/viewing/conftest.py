"""The viewer as its user starts it, and a browser in front of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.stand import free_port, wait_for
from tests.conftest import ROOT
from tests.viewing.browser import viewer

PICTURES = Path(os.environ.get("SCREENSHOTS", ROOT / "tests" / "viewing" / "screenshots"))
NO_ROUTES = """
[node]
host = "127.0.0.1"
port = $node_port
storage = "node"
"""


class Stand:
    """`deploy/viewer/run.py` on free ports."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port, self.dicom_port, self.orthanc_port = folder, free_port(), free_port(), free_port()
        ports = {
            "--port": self.port,
            "--dicom-port": self.dicom_port,
            "--orthanc-port": self.orthanc_port,
            "--node-port": free_port(),
        }
        command = [sys.executable, str(ROOT / "deploy" / "viewer" / "run.py"), "--folder", str(folder), *arguments]
        for name, port in ports.items():
            command += [name, str(port)]
        self._log = (folder / "run.log").open("wb")
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL)
        wait_for("the viewer to be ready", self._is_ready, seconds=150)

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log()
        return "Ctrl-C ends everything" in self.log()

    @property
    def url(self) -> str:
        """The address that is printed, with its token."""
        return re.search(r"http://localhost:\d+/\?token=\w+", self.log()).group()

    def log(self) -> str:
        return (self.folder / "run.log").read_text(errors="replace")

    def end(self) -> int:
        """Press Ctrl-C and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        code = self.process.wait(90)
        self._log.close()
        return code


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """PACS and viewer, with a node that runs no model."""
    folder = tmp_path_factory.mktemp("viewer")
    (folder / "without-routes.toml").write_text(NO_ROUTES)
    made = Stand(folder, "--settings", str(folder / "without-routes.toml"))
    yield made
    made.end()


@pytest.fixture
def look(tool, tmp_path, request):
    """Return a function that opens a browser on a stand's address."""

    def at(url: str):
        return viewer(tool("chromium"), url, tmp_path / "profile", PICTURES / request.node.name)

    return at
