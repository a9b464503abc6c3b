"""Which series a model takes: by what headers say, and the best of several."""

from __future__ import annotations

import pytest
from pydicom import Dataset

from dicom_node.findings import Reason
from dicom_node.manifest import InputSlot
from dicom_node.selection import objections, rank, sharpness


def header(**values) -> Dataset:
    made = Dataset()
    made.Modality = "CT"
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def reasons(header, **slot):
    return [reason for reason, _ in objections(header, InputSlot(modality=("CT",), **slot))]


def test_a_series_that_says_nothing_wrong_suits():
    assert reasons(header()) == []
    assert reasons(header(BodyPartExamined="CHEST", ImageType=["ORIGINAL", "PRIMARY"]), body_part=("CHEST",)) == []


@pytest.mark.parametrize(
    ("values", "slot", "reason"),
    [
        ({"Modality": "MR"}, {}, Reason.WRONG_MODALITY),
        ({"BodyPartExamined": "HEAD"}, {"body_part": ("CHEST",)}, Reason.WRONG_BODY_PART),
        ({"ImageType": ["DERIVED", "LOCALIZER"]}, {}, Reason.WRONG_IMAGE_TYPE),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, {"image_type": ("ORIGINAL",)}, Reason.WRONG_IMAGE_TYPE),
        ({}, {"contrast": "with"}, Reason.WRONG_CONTRAST),
        ({"ContrastBolusAgent": "Iomeprol"}, {"contrast": "without"}, Reason.WRONG_CONTRAST),
        ({"SeriesDescription": "T2 tse"}, {"when": {"SeriesDescription": ".*flair.*"}}, Reason.WRONG_HEADER),
        ({}, {"when": {"EchoTime": "2\\..*"}}, Reason.WRONG_HEADER),
    ],
)
def test_each_mismatch_has_its_reason(values, slot, reason):
    assert reasons(header(**values), **slot) == [reason]


def test_a_pattern_is_the_whole_value_in_any_case():
    assert reasons(header(SeriesDescription="Ax T2 FLAIR fs"), when={"SeriesDescription": ".*flair.*"}) == []
    assert reasons(header(SeriesDescription="Ax T2 FLAIR fs"), when={"SeriesDescription": "flair"}) != []


def test_a_reason_quotes_no_value_of_a_header():
    [(_, detail)] = objections(header(PatientName="Doe^Jo"), InputSlot(modality=("CT",), when={"PatientName": "X"}))

    assert "Doe" not in detail


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("B30f", 0.0), ("Br36", 0.0), ("B70f", 1.0), ("Bl57", 1.0), ("B45f", 0.5), ("STANDARD", 0.0), ("LUNG", 1.0),
     ("BONEPLUS", 1.0), ("B", 0.0), ("YB", 1.0), ("FC12", 0.0), ("FC52", 1.0), ("", 0.5), ("nobody knows", 0.5)],
)  # fmt: skip
def test_kernels_of_all_vendors_have_a_sharpness(kernel, expected):
    assert sharpness(kernel) == expected


def test_candidates_are_compared_in_the_stated_order():
    thin_sharp = (header(SliceThickness="1.0", ConvolutionKernel="B70f"), 300)
    thin_soft = (header(SliceThickness="1.0", ConvolutionKernel="B30f"), 300)
    thick_soft = (header(SliceThickness="5.0", ConvolutionKernel="B30f"), 60)
    unknown = (header(), 400)
    candidates = [unknown, thick_soft, thin_sharp, thin_soft]

    def best(*prefer):
        slot = InputSlot(modality=("CT",), prefer=prefer)
        return min(candidates, key=lambda one: rank(*one, slot))

    assert best("thinnest", "soft_kernel") is thin_soft
    assert best("soft_kernel", "most_slices") is thin_soft
    assert best("most_slices") is unknown
    newer = (header(AcquisitionDate="20260102", AcquisitionTime="111500.123"), 1)
    older = (header(AcquisitionDate="20260102", AcquisitionTime="101500"), 1)
    slot = InputSlot(modality=("CT",), prefer=("newest",))
    assert min([older, newer], key=lambda one: rank(*one, slot)) is newer
