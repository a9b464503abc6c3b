"""A node in a process of its own, with eyes on what it holds: threads, descriptors, memory, words on standard error."""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.acceptance.stand import NodeProcess, free_port

SLACK = 14  # of descriptors and threads: pooled connections to the ledger, threads that report; a leak has hundreds


def is_slot(descriptor: Path) -> bool:
    with suppress(FileNotFoundError):  # closed meanwhile
        return os.readlink(descriptor).endswith(".slot")
    return False


class Watched:
    """A node process, seen from outside."""

    def __init__(self, node: NodeProcess) -> None:
        self.node = node
        self.port = node.port

    @property
    def _proc(self) -> Path:
        return Path("/proc") / str(self.node.process.pid)

    @property
    def threads(self) -> int:
        return len(list((self._proc / "task").iterdir()))

    @property
    def descriptors(self) -> int:
        """Return how many are open, without the slots that are kept for what comes next."""
        return sum(not is_slot(each) for each in (self._proc / "fd").iterdir())

    @property
    def megabytes(self) -> float:
        (line,) = [line for line in (self._proc / "status").read_text().splitlines() if line.startswith("VmRSS")]
        return int(re.findall(r"\d+", line)[0]) / 1024

    def settle(self, *, threads: int, descriptors: int, seconds: float = 20.0) -> None:
        """Wait until no more is held than before."""
        deadline = time.monotonic() + seconds
        while self.threads > threads + SLACK or self.descriptors > descriptors + SLACK:
            held = f"{self.threads} threads (before: {threads}), {self.descriptors} descriptors (before: {descriptors})"
            assert time.monotonic() < deadline, held
            time.sleep(0.1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    text = """[receive]
minimum_free_megabytes = 10
association_timeout = 3
network_timeout = 4
maximum_instance_megabytes = 8
maximum_connections_per_address = 60
maximum_associations = 40
"""
    node = NodeProcess(tmp_path_factory.mktemp("node") / "node", pacs_port=free_port())
    settings = node.settings_path.read_text().replace("[receive]\nminimum_free_megabytes = 10\n", text)
    node.settings_path.write_text(re.sub(r"\[\[route\]\].*", "", settings, flags=re.DOTALL))
    node.start()
    seen = Watched(node)
    for _ in range(5):  # what is made on first use is made
        assert node.answers()
    time.sleep(1.0)
    yield seen
    node.end()


@pytest.fixture
def receiving(tmp_path):
    """Starts an SCP in this process and returns its port; once."""
    from dicom_node.config import parse
    from dicom_node.intake import Intake
    from dicom_node.ledger import Ledger
    from dicom_node.recorder import Recorder
    from dicom_node.scp import Scp
    from dicom_node.spool import Spool

    with ExitStack() as started:

        def start() -> int:
            settings = parse('[node]\nhost = "127.0.0.1"\nport = 0\nstorage = "storage"', base=tmp_path)
            ledger = Ledger(settings.ledger_url, migrate=True)
            started.callback(ledger.close)
            spool = Spool(settings.node.storage)
            recorder = Recorder(ledger, spool, node_id="node")
            recorder.start()
            started.callback(recorder.stop)
            scp = Scp(settings, ledger, Intake(spool, recorder), recorder)
            port = scp.start()
            started.callback(scp.stop, grace=1.0)
            return port

        yield start


@pytest.fixture
def receiver_in_process(receiving):
    """Starts an SCP in this process, sends it one instance, and returns its answer."""
    from pynetdicom import AE

    from tests.datasets import CT, EXPLICIT, as_file, ct

    def send() -> int:
        port = receiving()
        entity = AE(ae_title="SCANNER")
        entity.acse_timeout = entity.dimse_timeout = 5
        entity.add_requested_context(CT, EXPLICIT)
        association = entity.associate("127.0.0.1", port)
        answer = association.send_c_store(as_file(ct(1), EXPLICIT))
        association.release()
        return answer.Status

    return send
