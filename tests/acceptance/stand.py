"""Processes of the acceptance tests: the node with its children, Orthanc, and those who send."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pynetdicom import AE

from dicom_node.config import load
from dicom_node.ledger import Ledger

SETTINGS = """
[node]
ae_title = "DICOM_NODE"
host = "127.0.0.1"
port = {port}
storage = "storage"
{node}
[receive]
minimum_free_megabytes = 10
{receive}
[completion]
settle = {settle}
quiet = {quiet}
[jobs]
sweep = 0.2
hint_again = 2.0
lease = {lease}
[delivery]
first_delay = 0.5
maximum_delay = 2.0
connect_timeout = 3.0
[peer.PACS]
ae_title = "ORTHANC"
host = "127.0.0.1"
port = {pacs_port}
{peer}
[[route]]
name = "chest"
when = {{ Modality = "CT" }}
run = {models}
send_to = "PACS"
"""


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], *, seconds: float = 60.0, every: float = 0.1) -> Any:
    """Return the first true answer of `condition`; fail with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(every)
    raise AssertionError(f"waited {seconds:g} s in vain: {what}")


def may_come_first() -> bool:
    """Whether a process that this one starts is where nobody has chosen, and may go before others."""
    try_it = "import os; os.getpriority(os.PRIO_PROCESS, 0) == 0 and os.nice(-1) == -1 or exit(1)"
    return subprocess.run([sys.executable, "-c", try_it], capture_output=True, check=False).returncode == 0


class NodeProcess:
    """`dicom-node serve` with settings of its own."""

    def __init__(
        self,
        folder: Path,
        *,
        pacs_port: int,
        models: list[str] | None = None,
        settle: float = 0.5,
        quiet: float = 3.0,
        lease: float = 5.0,
        node: str = "",
        receive: str = "",
        peer: str = "",
        port: int | None = None,
    ) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.environment: dict[str, str] = {}
        self.port = port or free_port()
        self.settings_path = folder / "node.toml"
        self.settings_path.write_text(
            SETTINGS.format(
                port=self.port,
                pacs_port=pacs_port,
                models=json.dumps(models or ["ct_lung"]),
                settle=settle,
                quiet=quiet,
                lease=lease,
                node=node,
                receive=receive,
                peer=peer,
            )
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.verbose = False

    def spawn(self) -> None:
        """Start it without waiting for it."""
        command = [sys.executable, "-m", "dicom_node", "serve", "--settings", str(self.settings_path)]
        command += ["--verbose"] if self.verbose else []
        environment = {**os.environ, **self.environment}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def start(self) -> NodeProcess:
        self.spawn()
        wait_for("the node to answer C-ECHO", self.answers, seconds=40)
        return self

    def answers(self) -> bool:
        entity = AE(ae_title="TEST")
        entity.add_requested_context("1.2.840.10008.1.1")
        entity.connection_timeout = 1.0
        association = entity.associate("127.0.0.1", self.port)
        established = association.is_established
        if established:
            association.release()
        return established

    def kill(self) -> None:
        """kill -9 of the node's own process; its children have to notice by themselves."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(40)
        self.kill_children("valkey-server")
        self.kill_children("-m workers")
        self.kill_children("-m dicom_node.receiver")

    def kill_children(self, word: str) -> None:
        """kill -9 of the children whose command line has `word` in it."""
        for pid in self.children_pids(word):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def children_pids(self, word: str) -> list[int]:
        """Processes of this node, alive or orphaned, whose command line has `word` in it."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if word in line and (str(self.folder) in line or f":{self.port}#" in line):
                        found.append(int(entry.name))
        return found

    @property
    def ledger(self) -> Ledger:
        return Ledger(load(self.settings_path).ledger_url)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def jobs(self) -> list[dict[str, Any]]:
        ledger = self.ledger
        try:
            return ledger.history.recent_jobs(limit=10_000)
        finally:
            ledger.close()

    def wait_until_idle(self, *, jobs: int, seconds: float = 240.0) -> list[dict[str, Any]]:
        """Wait until there are at least `jobs` jobs and none is left to do; return them."""

        def idle() -> list[dict[str, Any]] | None:
            found = self.jobs()
            busy = [job for job in found if job["state"] in ("queued", "running", "committing")]
            return found if len(found) >= jobs and not busy else None

        try:
            return wait_for(f"{jobs} jobs to end", idle, seconds=seconds, every=0.3)
        except AssertionError as error:
            states = [(job["job_id"], job["kind"], job["state"], job["reason"]) for job in self.jobs()]
            raise AssertionError(f"{error}\n{states}\n{self.log()[-4000:]}") from None

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dicom_node", *arguments, "--settings", str(self.settings_path)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "200"}
        )


class OrthancProcess:
    """Debian's Orthanc as the destination."""

    def __init__(
        self, executable: str, folder: Path, *, dicom_port: int, http_port: int, takes_unknown: bool = True
    ) -> None:
        folder.mkdir(parents=True)
        self.folder, self.dicom_port, self.http_port = folder, dicom_port, http_port
        self._executable = executable
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "orthanc.json").write_text(
            json.dumps(
                {
                    "StorageDirectory": str(folder / "db"),
                    "IndexDirectory": str(folder / "db"),
                    "DicomPort": dicom_port,
                    "HttpPort": http_port,
                    "DicomAlwaysAllowStore": True,
                    "UnknownSopClassAccepted": takes_unknown,
                    "DicomCheckCalledAet": False,
                    "StorageCompression": False,
                    "RemoteAccessAllowed": False,
                    "AuthenticationEnabled": False,
                    "Plugins": [],
                    "OverwriteInstances": False,
                }
            )
        )

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._executable, str(self.folder / "orthanc.json")], stdout=log, stderr=log
            )
        wait_for("Orthanc to answer", self._answers, seconds=30)

    def _answers(self) -> bool:
        try:
            return bool(self.get("/system"))
        except (urllib.error.URLError, ConnectionError):
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=30) as answer:
            return json.load(answer)

    def file(self, instance: str) -> bytes:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.http_port}/instances/{instance}/file", timeout=30
        ) as answer:
            return answer.read()

    def series(self) -> list[dict[str, Any]]:
        return [self.get(f"/series/{name}") for name in self.get("/series")]

    def studies(self) -> list[dict[str, Any]]:
        return [self.get(f"/studies/{name}") for name in self.get("/studies")]

    def files_of(self, modality: str) -> list[bytes]:
        """Every instance of a modality, as stored."""
        return [
            self.file(instance)
            for series in self.series()
            if series["MainDicomTags"].get("Modality") == modality
            for instance in series["Instances"]
        ]


def storescu(port: int, *paths: Path, called: str = "DICOM_NODE") -> subprocess.CompletedProcess[str]:
    """Send with DCMTK's storescu, Nagle's algorithm off, as a scanner does."""
    executable = "/usr/bin/storescu"
    if not Path(executable).exists():
        executable = shutil.which("storescu") or executable
    return subprocess.run(
        [executable, "-aet", "SCANNER", "-aec", called, "-v", "127.0.0.1", str(port), *map(str, paths)],
        capture_output=True,
        text=True,
        env={**os.environ, "TCP_NODELAY": "1"},
        timeout=300,
    )
