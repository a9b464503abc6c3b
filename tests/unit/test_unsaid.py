"""What a sender puts where it does not belong is not passed on: no ledger, no message and no answer quotes it."""

from __future__ import annotations

import pytest
from pydicom import Dataset

from dicom_node.attributes import says_who
from dicom_node.commitment import Malformed, read_report, read_request
from dicom_node.log import _with_trace
from dicom_node.manifest import InputSlot
from dicom_node.selection import objections
from dicom_node.services import modality_term
from tests.datasets import CT, encoded

NAME = "ZZYZXQ SECRETIVE"


def test_a_modality_that_is_none_is_nothing():
    assert [modality_term(value) for value in ("CT", "SEG", "RTSTRUCT", NAME, "ct", "")] == [
        "CT",
        "SEG",
        "RTSTRUCT",
        "",
        "",
        "",
    ]


def test_why_a_series_is_not_what_a_model_takes_quotes_nothing():
    header = Dataset()
    header.Modality, header.BodyPartExamined, header.ImageType = NAME, "ZZYZXQ", ["ZZYZXQ", NAME]
    slot = InputSlot(modality=("CT",), body_part=("CHEST",), image_type=("AXIAL",))

    said = " ".join(detail for _, detail in objections(header, slot))

    assert "CHEST" in said
    assert "ZZYZXQ" not in said


def asked(**item: str) -> Dataset:
    dataset, reference = Dataset(), Dataset()
    for keyword, value in {"ReferencedSOPClassUID": CT, "ReferencedSOPInstanceUID": "1.2.3", **item}.items():
        reference.add_new(keyword, "UT", value)
    dataset.TransactionUID = "1.2"
    dataset.ReferencedSOPSequence = [reference]
    return dataset


@pytest.mark.parametrize("read", [read_request, read_report])
@pytest.mark.parametrize("keyword", ["ReferencedSOPClassUID", "ReferencedSOPInstanceUID"])
@pytest.mark.parametrize("value", [NAME, "", "1." * 40, "../../etc"])
def test_commitment_of_what_has_no_uid_is_malformed(read, keyword, value):
    with pytest.raises(Malformed) as refused:
        read(encoded(asked(**{keyword: value})), is_implicit=False)

    assert "ZZYZXQ" not in str(refused.value)


@pytest.mark.parametrize("reason", [-1, 70_000, 10**30, "ZZYZXQ"])
def test_a_failure_reason_that_is_none_is_a_processing_failure(reason):
    dataset = asked()
    dataset.FailedSOPSequence, dataset.ReferencedSOPSequence = dataset.ReferencedSOPSequence, []
    dataset.FailedSOPSequence[0].add_new("FailureReason", "LO", str(reason))

    assert list(read_report(encoded(dataset), is_implicit=False).failed.values()) == [0x0110]


@pytest.mark.parametrize("keyword", ["PatientName", "PatientBirthDate", "ReferringPhysicianName", "AccessionNumber"])
def test_what_says_who_a_patient_is_is_known(keyword):
    assert says_who(keyword)
    assert not says_who("SeriesDescription")
    assert not says_who("calling_ae_title")


def test_the_trace_of_an_endless_recursion_is_short():
    def deeper():
        deeper()

    try:
        deeper()
    except RecursionError as error:
        told = _with_trace(None, "", {"exc_info": error})["exception"]

    assert told.count("\n") <= 20
    assert told.startswith("RecursionError")
