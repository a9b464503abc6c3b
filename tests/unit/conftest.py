"""A real ledger and a real spool in a folder of their own."""

from __future__ import annotations

import pytest

from dicom_node.entities import AssociationIdentity
from dicom_node.intake import Intake
from dicom_node.ledger import Ledger
from dicom_node.recorder import Recorder
from dicom_node.spool import Spool


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite3'}", migrate=True)
    yield made
    made.close()


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "storage")


@pytest.fixture
def association():
    return AssociationIdentity("association-1", "SCANNER", "DICOM_NODE", "127.0.0.1")


@pytest.fixture
def recorder(ledger, spool):
    return Recorder(ledger, spool, node_id="node", clock=lambda: 1000.0)


@pytest.fixture
def intake(spool, recorder):
    return Intake(spool, recorder, clock=lambda: 1000.0)
