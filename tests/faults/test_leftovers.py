"""Files that attempts wrote in vain do not stay; files that somebody may still need do."""

from __future__ import annotations

import os
import time

import pytest

from dicom_node.inspection import Inspection
from dicom_node.ledger import Ledger
from dicom_node.ledger.moving import StoredResult
from dicom_node.spool import Spool
from tests.datasets import EXPLICIT, ct, write
from tests.unit.test_ledger import claim, inference

DAY = 86400.0


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite3'}", migrate=True)
    yield made
    made.close()


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "storage")


def kept(spool, ledger, tmp_path, number: int, *, recorded: bool):
    """Keep a result; return its file."""
    content = write(ct(number), tmp_path / "made.dcm").read_bytes()
    sop_instance_uid = str(ct(number).SOPInstanceUID)
    path, sha256 = spool.keep_result(sop_instance_uid, content)
    if recorded:
        held = claim(ledger, inference(ledger, f"1.3.{number}"))
        made = StoredResult(sop_instance_uid, "1.2.3", "1.2", "1.2", EXPLICIT, "seg", path, sha256, len(content))
        ledger.jobs.inferred(held, [made], now=30.0, seconds={})
    return spool.absolute(path)


def test_an_old_result_without_a_row_is_found_and_no_other(spool, ledger, tmp_path):
    old, young = (kept(spool, ledger, tmp_path, number, recorded=False) for number in (1, 2))
    recorded = kept(spool, ledger, tmp_path, 3, recorded=True)
    for path in (old, recorded):
        os.utime(path, (time.time() - 2 * DAY,) * 2)

    found = list(Inspection(ledger, spool.storage, grace=DAY).unrecorded_results())

    assert found == [old]
    assert young.exists()


def test_the_files_of_other_attempts_at_a_result_go_and_the_recorded_one_stays(spool, tmp_path):
    uid = str(ct(1).SOPInstanceUID)
    mine, _ = spool.keep_result(uid, b"one attempt")
    theirs, _ = spool.keep_result(uid, b"another attempt")
    neighbour, _ = spool.keep_result(uid[:-2] + "9" + uid[-2:], b"something else")

    spool.forget_other_results(uid, mine)

    assert spool.absolute(mine).exists()
    assert not spool.absolute(theirs).exists()
    assert spool.absolute(neighbour).exists()
