"""A result with one thing wrong is stopped before it is kept."""

from __future__ import annotations

from io import BytesIO

import pytest
from pydicom import Dataset, dcmread

from dicom_node.errors import ResultRefused
from dicom_node.selfcheck import problems_of, require_sound
from tests.conformance.cases import encode_case, encoded, enhanced_from, make_case
from tests.conformance.test_results import KINDS, groups_of


def contents(case) -> list[bytes]:
    return [encoded(result.dataset) for result in case.results]


@pytest.mark.parametrize("kind", KINDS)
def test_sound_results_pass(case_of, kind):
    case = case_of("oblique", **KINDS[kind])

    assert list(problems_of(contents(case), case.volume.source)) == []


def test_sound_results_of_an_enhanced_object_pass(case_of, tmp_path):
    classic = case_of("axial")
    case = encode_case(classic.phantom, [enhanced_from(classic.paths, tmp_path)])

    assert list(problems_of(contents(case), case.volume.source)) == []


@pytest.mark.parametrize(
    "name", ["chest_ct_lung_dx_a0001", "head_ct_ge_tilted", "head_mr_t1_sagittal", "enhanced_mr_t1"]
)
def test_sound_results_of_real_series_pass(shared_data, name):
    case = encode_case(None, sorted((shared_data / name / "series").glob("*.dcm")))

    assert list(problems_of(contents(case), case.volume.source)) == []


def another_patient(seg: Dataset, report: Dataset) -> None:
    seg.PatientID = "SOMEBODY-ELSE"


def another_study(seg: Dataset, report: Dataset) -> None:
    report.StudyInstanceUID = "1.2.3"


def an_unknown_source(seg: Dataset, report: Dataset) -> None:
    frame = seg.PerFrameFunctionalGroupsSequence[3]
    frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID = "1.2.3"


def an_unknown_image(seg: Dataset, report: Dataset) -> None:
    scoord(report).ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID = "1.2.3"


def the_wrong_class(seg: Dataset, report: Dataset) -> None:
    scoord(report).ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"


def an_unknown_segment(seg: Dataset, report: Dataset) -> None:
    reference(report).ReferencedSegmentNumber = 7


def a_box_beside_the_image(seg: Dataset, report: Dataset) -> None:
    points = list(scoord(report).GraphicData)
    scoord(report).GraphicData = [points[0] + 1000, *points[1:]]


def a_frame_too_few(seg: Dataset, report: Dataset) -> None:
    seg.PerFrameFunctionalGroupsSequence = list(seg.PerFrameFunctionalGroupsSequence)[:-1]


def bytes_too_few(seg: Dataset, report: Dataset) -> None:
    seg.PixelData = seg.PixelData.read()[:-2]


def a_segment_without_a_frame(seg: Dataset, report: Dataset) -> None:
    extra = Dataset()
    extra.update(seg.SegmentSequence[0])
    extra["SegmentNumber"] = seg.SegmentSequence[0]["SegmentNumber"].__class__("SegmentNumber", "US", 9)
    seg.SegmentSequence = [*seg.SegmentSequence, extra]


@pytest.mark.parametrize(
    "harm",
    [
        *(another_patient, another_study, an_unknown_source, an_unknown_image, the_wrong_class, an_unknown_segment),
        *(a_box_beside_the_image, a_frame_too_few, bytes_too_few, a_segment_without_a_frame),
    ],
)
def test_one_thing_wrong_stops_the_results(tmp_path, harm):
    case = make_case(tmp_path, "axial")
    harm(case.of("seg")[0], case.of("sr")[0])

    with pytest.raises(ResultRefused):
        require_sound(contents(case), case.volume.source)


def test_bytes_that_are_no_object_stop_the_results(case_of):
    case = case_of("axial")
    whole = contents(case)

    with pytest.raises(ResultRefused, match="cannot be read back"):
        require_sound([b"not DICOM", *whole[1:]], case.volume.source)


def test_the_message_does_not_say_who_the_patient_is(tmp_path):
    case = make_case(tmp_path, "axial")
    case.of("seg")[0].PatientName = "Secret^Name"

    with pytest.raises(ResultRefused) as refused:
        require_sound(contents(case), case.volume.source)

    assert "Secret" not in str(refused.value)
    assert "PHANTOM" not in str(refused.value)


def scoord(report: Dataset) -> Dataset:
    return next(item for item in groups_of(report)[0].ContentSequence if item.ValueType == "SCOORD")


def reference(report: Dataset) -> Dataset:
    """The reference to a segment in the second group."""
    group = groups_of(report)[1]
    return next(
        item.ReferencedSOPSequence[0]
        for item in group.ContentSequence
        if item.ValueType == "IMAGE" and "ReferencedSegmentNumber" in item.ReferencedSOPSequence[0]
    )


def test_what_a_viewer_reads_is_what_was_checked(case_of):
    case = case_of("axial")

    for content, result in zip(contents(case), case.results, strict=True):
        assert dcmread(BytesIO(content)).SOPInstanceUID == result.dataset.SOPInstanceUID
