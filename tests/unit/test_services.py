from __future__ import annotations

from ipaddress import ip_network

import pytest
from pydicom.uid import UID, AllTransferSyntaxes
from pynetdicom import sop_class
from pynetdicom.status import GENERAL_STATUS, STORAGE_SERVICE_CLASS_STATUS

from dicom_node.services import (
    A_ASSOCIATE_RJ,
    RESULT_SOP_CLASSES,
    STORAGE_BY_UID,
    STORAGE_SOP_CLASSES,
    STORE_ANSWERS,
    TRANSFER_SYNTAXES,
    VERDICTS,
    Admission,
    Caller,
    Credentials,
    Rejection,
    Status,
    Use,
    Verdict,
    verdict,
)

WANTED = [
    "CTImageStorage",
    "EnhancedCTImageStorage",
    "LegacyConvertedEnhancedCTImageStorage",
    "MRImageStorage",
    "EnhancedMRImageStorage",
    "LegacyConvertedEnhancedMRImageStorage",
    "ComputedRadiographyImageStorage",
    "DigitalXRayImageStorageForPresentation",
    "DigitalXRayImageStorageForProcessing",
    "DigitalMammographyXRayImageStorageForPresentation",
    "DigitalMammographyXRayImageStorageForProcessing",
    "UltrasoundImageStorage",
    "UltrasoundMultiFrameImageStorage",
    "XRayAngiographicImageStorage",
    "PositronEmissionTomographyImageStorage",
    "EnhancedPETImageStorage",
    "LegacyConvertedEnhancedPETImageStorage",
    "NuclearMedicineImageStorage",
    "SecondaryCaptureImageStorage",
    "MultiFrameTrueColorSecondaryCaptureImageStorage",
    "SegmentationStorage",
    "Comprehensive3DSRStorage",
    "KeyObjectSelectionDocumentStorage",
]


@pytest.mark.parametrize("keyword", WANTED)
def test_every_storage_class_that_the_issue_names_is_accepted(keyword):
    assert getattr(sop_class, keyword) in STORAGE_BY_UID


def test_every_row_is_a_storage_class_of_the_standard_under_its_own_name():
    for row in STORAGE_SOP_CLASSES:
        name = UID(row.uid).name.removesuffix(" (Retired)")
        if name == row.uid:  # Label Map Segmentation is newer than pydicom's dictionary
            continue

        assert name.endswith("Storage") or "Storage - For" in name, row
        assert row.name.split()[0].casefold() in name.casefold(), row


def test_no_class_has_two_rows():
    assert len(STORAGE_BY_UID) == len(STORAGE_SOP_CLASSES)


def test_slices_count_one_by_one_and_results_are_never_an_input():
    assert [row.name for row in STORAGE_SOP_CLASSES if row.use is Use.IMAGE] == [
        "CT Image",
        "MR Image",
        "Positron Emission Tomography Image",
    ]
    images = {uid for uid in RESULT_SOP_CLASSES if STORAGE_BY_UID[uid].use is not Use.KEPT}
    assert {RESULT_SOP_CLASSES[uid] for uid in images} == {"Secondary Capture Image"}  # ours is known by its maker


def test_every_syntax_that_pydicom_names_is_accepted():
    assert set(TRANSFER_SYNTAXES) == set(AllTransferSyntaxes)


def test_every_status_that_a_store_is_answered_with_is_the_standards():
    for status in STORE_ANSWERS:
        assert status in STORAGE_SERVICE_CLASS_STATUS or status == Status.PROCESSING_FAILURE


def test_every_other_status_is_one_of_the_general_ones():
    for status in set(Status) - set(STORE_ANSWERS):
        assert status in GENERAL_STATUS


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        (0x0000, Verdict.STORED),
        (0xB000, Verdict.STORED),
        (0xB006, Verdict.STORED),
        (0xB007, Verdict.STORED),
        (0x0111, Verdict.STORED),
        (0x0110, Verdict.AGAIN),
        (0x0213, Verdict.AGAIN),
        (0xA700, Verdict.AGAIN),
        (0xA7FF, Verdict.AGAIN),
        (0xA900, Verdict.NEVER),
        (0xA9FF, Verdict.NEVER),
        (0xC000, Verdict.NEVER),
        (0xCFFF, Verdict.NEVER),
        (0x0117, Verdict.NEVER),
        (0x0122, Verdict.NEVER),
        (0x0124, Verdict.NEVER),
        (0xFFFF, Verdict.NEVER),
        (0x1234, Verdict.NEVER),
    ],
)
def test_a_status_means_stored_again_or_never(status, meaning):
    assert verdict(status) is meaning


def test_the_ranges_of_verdicts_do_not_overlap():
    seen: set[int] = set()
    for first, last, _ in VERDICTS:
        numbers = set(range(first, last + 1))
        assert numbers
        assert not numbers & seen
        seen |= numbers


def admission(**changes) -> Admission:
    values = {
        "ae_title": "NODE",
        "check_called_ae_title": True,
        "calling_ae_titles": frozenset({"CT1", "CT2"}),
        "maximum_associations": 5,
        "maximum_associations_per_peer": 2,
    }
    return Admission(**{**values, **changes})


@pytest.mark.parametrize(
    ("called", "calling", "in_all", "of_peer", "expected"),
    [
        ("NODE", "CT1", 0, 0, None),
        ("NODE ", " CT1 ", 4, 1, None),
        ("OTHER", "CT1", 0, 0, Rejection.CALLED_AE_TITLE),
        ("NODE", "EVIL", 0, 0, Rejection.CALLING_AE_TITLE),
        ("NODE", "CT1", 5, 0, Rejection.LOCAL_LIMIT),
        ("NODE", "CT1", 3, 2, Rejection.PEER_LIMIT),
        ("node", "CT1", 0, 0, Rejection.CALLED_AE_TITLE),
    ],
)
def test_admission_says_why_not(called, calling, in_all, of_peer, expected):
    answer = admission().judge(Caller(called, calling, "10.1.2.3"), open_in_all=in_all, open_of_peer=of_peer)

    assert answer is expected


def test_titles_are_checked_only_when_configured():
    anyone = admission(check_called_ae_title=False, calling_ae_titles=frozenset())

    assert anyone.judge(Caller("X", "Y", "10.1.2.3"), open_in_all=0, open_of_peer=0) is None


CERTIFICATE, OTHER = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("caller", "expected"),
    [
        (Caller("NODE", "CT1", "10.1.2.3", CERTIFICATE), None),
        (Caller("NODE", "CT1", "::ffff:10.1.2.3", CERTIFICATE), None),
        (Caller("NODE", "CT1", "10.2.0.1", CERTIFICATE), Rejection.ADDRESS),
        (Caller("NODE", "CT1", "10.1.2.3", OTHER), Rejection.CERTIFICATE),
        (Caller("NODE", "CT1", "10.1.2.3"), Rejection.CERTIFICATE),
        (Caller("NODE", "CT2", "10.1.2.3", None, "scanner", "secret"), None),
        (Caller("NODE", "CT2", "10.1.2.3", None, "scanner", "Secret"), Rejection.USER),
        (Caller("NODE", "CT2", "10.1.2.3", CERTIFICATE), Rejection.USER),
    ],
)
def test_networks_certificates_and_users_are_bound_to_titles(caller, expected):
    bound = admission(
        networks=(ip_network("10.1.0.0/16"),),
        credentials={
            "CT1": Credentials(frozenset({CERTIFICATE})),
            "CT2": Credentials(frozenset(), "scanner", "secret"),
        },
    )

    assert bound.judge(caller, open_in_all=0, open_of_peer=0) is expected


def test_limits_are_transient_and_the_rest_is_permanent():
    transient = {rejection for rejection, (result, _, _) in A_ASSOCIATE_RJ.items() if result == 2}

    assert transient == {Rejection.LOCAL_LIMIT, Rejection.PEER_LIMIT, Rejection.STOPPING}
    assert set(A_ASSOCIATE_RJ) == set(Rejection)
