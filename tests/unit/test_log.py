from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.datasets import IDENTITY, ct, encoded

PROGRAM = """
import structlog
from dicom_node import log
log.configure()
logger = structlog.get_logger()
{body}
"""


def logged(body: str) -> list[dict]:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_is_an_event_with_fields():
    (line,) = logged("logger.info('job.finished', job=42)")

    assert line["event"] == "job.finished"
    assert line["job"] == 42
    assert line["level"] == "info"


def test_a_patients_identity_is_withheld_even_where_somebody_passes_it():
    (line,) = logged("logger.info('x', patient_name='Zzyzx', patient_id='4711')")

    assert line["patient_name"] == line["patient_id"] == "[withheld]"


def test_a_traceback_says_where_and_never_quotes_a_message():
    (line,) = logged(
        """
def inner():
    raise KeyError("Zzyzx^Secretive")
def outer():
    try:
        inner()
    except KeyError as error:
        raise ValueError("born on 19470811") from error
try:
    outer()
except ValueError:
    logger.exception("job.defect")
"""
    )

    assert "ValueError" in line["exception"]
    assert "KeyError" in line["exception"]
    assert " inner" in line["exception"]
    assert "Zzyzx" not in str(line)
    assert "19470811" not in str(line)


@pytest.mark.parametrize("library", ["pydicom", "pynetdicom", "highdicom"])
def test_the_dicom_libraries_do_not_speak(library):
    assert not logged(f"import logging; logging.getLogger('{library}').error('Zzyzx^Secretive')")


def test_pydicoms_warnings_about_values_do_not_speak():
    assert not logged("from pydicom import Dataset\nd = Dataset()\nd.PatientBirthDate = '1947-Zzyzx'")


def test_what_intake_raises_and_records_names_no_patient(ledger, intake, association):
    dataset = ct()
    arguments = {
        "transfer_syntax_uid": "1.2.840.10008.1.2.1",
        "affected_sop_class_uid": str(dataset.SOPClassUID),
        "affected_sop_instance_uid": str(dataset.SOPInstanceUID),
        "association": association,
    }

    intake.keep(memoryview(encoded(dataset)), **arguments)
    intake.keep(memoryview(encoded(ct(pixel=9))), **arguments)

    everything = str(ledger.history.recent_events(limit=100)) + str(ledger.history.recent_series(limit=10))
    assert not [value for value in IDENTITY.values() if value in everything]
