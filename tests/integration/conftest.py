"""A node's parts over real sockets on loopback, and what sends to them."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pynetdicom import AE

from dicom_node import log
from dicom_node.audit import Audit
from dicom_node.config import Settings, parse
from dicom_node.intake import Intake
from dicom_node.ledger import Ledger
from dicom_node.recorder import Recorder
from dicom_node.scp import Scp
from dicom_node.spool import Spool


@pytest.fixture(autouse=True)
def libraries_as_in_the_node(monkeypatch):
    """pynetdicom and pydicom configured as `log.configure` does in every process of the node."""
    import pydicom.config
    from pynetdicom import _config

    monkeypatch.setattr(_config, "LOG_HANDLER_LEVEL", _config.LOG_HANDLER_LEVEL)
    monkeypatch.setattr(_config, "UNRESTRICTED_STORAGE_SERVICE", False)
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", False)
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    log._silence_libraries()


@pytest.fixture(scope="session")
def pki(tmp_path_factory, tool):
    """An authority and what it has signed; `stranger` and what that has signed; a certificate that nobody has signed.

    NAME.pem and NAME.key: node, node2, scanner, other; `expired` and `future` are not valid now; intruder's is the
    stranger's; `alone` is self-signed; `elsewhere` is good for pacs.hospital.example only. The tests bear `peer`.
    """
    folder = tmp_path_factory.mktemp("pki")
    rsa = ["-newkey", "rsa:2048", "-nodes"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]

    def openssl(*arguments: object) -> None:
        subprocess.run([tool("openssl"), *map(str, arguments)], check=True, capture_output=True, cwd=folder)

    def authority(name: str) -> None:
        openssl("req", "-x509", *curve, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}")

    def sign(name: str, by: str = "ca", valid: tuple[str, str] | None = None, host: str = "") -> None:
        key = rsa if name == "node" else curve
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        names = f"DNS:{host}" if host else "DNS:localhost,IP:127.0.0.1"
        (folder / "extensions").write_text(f"subjectAltName={names}\n")
        (folder / "index").write_text("")
        (folder / "serial").write_text(f"{abs(hash(name)):X}"[:8] + "00\n")
        (folder / "ca.cnf").write_text(
            "[ca]\ndefault_ca=a\n[a]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
            "unique_subject=no\n[p]\ncommonName=supplied\n"
        )
        start, end = valid or ("20200101000000Z", "20991231235959Z")
        issuer = ["-cert", f"{by}.pem", "-keyfile", f"{by}.key", "-startdate", start, "-enddate", end]
        openssl(
            *("ca", "-batch", "-notext", "-config", "ca.cnf", "-extfile", "extensions", *issuer),
            *("-in", f"{name}.csr", "-out", f"{name}.pem"),
        )

    for name in ("ca", "stranger", "alone"):
        authority(name)
    for name in ("node", "node2", "scanner", "other"):
        sign(name)
    sign("intruder", by="stranger")
    sign("expired", valid=("20200101000000Z", "20210101000000Z"))
    sign("future", valid=("20900101000000Z", "20910101000000Z"))
    sign("elsewhere", host="pacs.hospital.example")
    return folder


@pytest.fixture
def free_port():
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture
def eventually():
    """Waits for a condition and returns its first true answer."""

    def wait(condition: Callable[[], Any], *, seconds: float = 10.0) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = condition()
            if answer:
                return answer
            time.sleep(0.02)
        raise AssertionError(f"waited {seconds:g} s in vain")

    return wait


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite3'}", migrate=True)
    yield made
    made.close()


class Receiver:
    """An SCP with its ledger and spool."""

    def __init__(self, folder: Path, ledger: Ledger, text: str) -> None:
        self.settings: Settings = parse(
            f'[node]\nae_title = "DICOM_NODE"\nhost = "127.0.0.1"\nport = 0\nstorage = "storage"\n{text}', base=folder
        )
        self.ledger = ledger
        minimum = self.settings.receive.minimum_free_megabytes * 1024 * 1024
        self.spool = Spool(self.settings.node.storage, minimum_free=minimum)
        audit = Audit(self.settings, ledger)
        self.recorder = Recorder(ledger, self.spool, node_id="node", on_end=audit.received)
        self.recorder.start()
        self.scp = Scp(self.settings, ledger, Intake(self.spool, self.recorder), self.recorder, audit=audit)
        self.port = self.scp.start()

    def stop(self, *, grace: float = 2.0) -> None:
        self.scp.stop(grace=grace)
        self.recorder.stop()

    def associate(self, *contexts: tuple[str, str], calling: str = "SCANNER", called: str = "DICOM_NODE", timeout=30):
        entity = AE(ae_title=calling)
        for sop_class, syntax in contexts or (("1.2.840.10008.1.1", "1.2.840.10008.1.2"),):
            entity.add_requested_context(sop_class, syntax)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = timeout
        return entity.associate("127.0.0.1", self.port, ae_title=called)

    def events(self, name: str) -> list[dict[str, Any]]:
        assert self.recorder.flush()
        return [event for event in self.ledger.history.recent_events(limit=10_000) if event["name"] == name]

    def files(self, folder: str = "studies") -> list[Path]:
        assert self.recorder.flush()
        return sorted((self.spool.storage / folder).rglob("*.dcm"))


@pytest.fixture
def receiver(tmp_path, ledger):
    """Makes SCPs; `receiver("[receive]...")` returns one that listens."""
    made: list[Receiver] = []

    def make(text: str = "[receive]\nminimum_free_megabytes = 1\n") -> Receiver:
        made.append(Receiver(tmp_path, ledger, text))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def dcmtk(tool):
    """Runs a DCMTK command, Nagle's algorithm off as on a scanner; the test bears the marker `peer`."""

    def run(name: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [tool(name), *map(str, arguments)]
        environment = {**os.environ, "TCP_NODELAY": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **options)

    return run
