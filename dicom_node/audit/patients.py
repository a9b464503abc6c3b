"""Who a file is of, for messages to a collector whose operator asked for it; nothing else may read it."""

from __future__ import annotations

from pathlib import Path

from pydicom import dcmread

from dicom_node.audit.messages import Patient

_UNKNOWN = "unknown"


def patient_of(path: Path) -> Patient:
    """Return the patient that a file names; one that cannot be read is of a patient with the identifier `unknown`."""
    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientID", "PatientName"])
        return Patient(str(header.get("PatientID") or _UNKNOWN), str(header.get("PatientName") or ""))
    except Exception:  # whatever a stored file does to pydicom, the event has happened and is reported
        return Patient(_UNKNOWN, "")


def patient_of_study(study: Path) -> Patient:
    """Return the patient of the first file in a study's folder."""
    return patient_of(next(study.rglob("*.dcm"), study))
