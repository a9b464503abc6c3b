"""Headers as real scanners and archives leave them: results are still written, right, and filed with their study."""

from __future__ import annotations

import logging
import subprocess

import pydicom.config
import pytest
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword

from dicom_node.errors import InputRefused
from tests.conformance.cases import encode_case, make_case
from tests.conformance.test_results import complaints


def stating(**elements):
    """An edit that states values however wrong."""

    def edit(dataset: Dataset) -> None:
        for keyword, value in elements.items():
            tag = tag_for_keyword(keyword)
            dataset[tag] = DataElement(tag, dictionary_VR(tag), value, validation_mode=0)

    return edit


def without(*keywords):
    def edit(dataset: Dataset) -> None:
        for keyword in keywords:
            dataset.pop(tag_for_keyword(keyword), None)

    return edit


IDENTITIES = {
    "PatientSex": "W",
    "PatientBirthDate": "19.02.1960",
    "StudyTime": "12:34:56",
    "StudyDate": "2026-11-22",
    "AccessionNumber": "12345678901234567890",
    "PatientID": "x" * 70,
    "StudyID": "",
    "PatientName": "Cher",
    "StudyDescription": "y" * 80,
}


@pytest.fixture
def as_the_node_reads(monkeypatch):
    """The node's logging set-up switches pydicom's warnings about values off: they quote them."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)


@pytest.mark.usefixtures("as_the_node_reads")
@pytest.mark.parametrize("keyword", IDENTITIES)
def test_patient_and_study_are_copied_word_for_word_even_where_wrong(tmp_path, keyword):
    case = make_case(tmp_path, edit=stating(**{keyword: IDENTITIES[keyword]}))

    for path in case.written(tmp_path / "results"):
        assert str(dcmread(path).get(keyword)) == IDENTITIES[keyword]


def test_a_patient_id_that_cannot_be_read_is_never_left_out_in_silence(tmp_path, monkeypatch):
    """Here warnings are errors, so a Patient ID that is too long is one that cannot be read."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.WARN)
    with pytest.raises(InputRefused, match="PatientID"):
        make_case(tmp_path, edit=stating(PatientID="x" * 70))


def test_no_library_logs_who_the_patient_is(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        make_case(tmp_path, edit=stating(PatientName="Zzyzx", PatientID="ID-4711"))

    assert "Zzyzx" not in caplog.text
    assert "ID-4711" not in caplog.text


CLEAN = {
    "no frame of reference": without("FrameOfReferenceUID"),
    "an empty frame of reference": stating(FrameOfReferenceUID=""),
    "a body part in small letters": stating(BodyPartExamined="chest"),
    "a body part that is no code": stating(BodyPartExamined="chest/abdomen"),
    "a side": stating(Laterality="R"),
    "a side that is none": stating(Laterality="U"),
    "an age without a unit": stating(PatientAge="45"),
    "loss stated as 1": stating(LossyImageCompression="1"),
    "loss stated as nothing": stating(LossyImageCompression=""),
    "loss with a ratio but no method": stating(LossyImageCompression="01", LossyImageCompressionRatio="7.1"),
    "spacing between slices below zero": stating(SpacingBetweenSlices="-20"),
    "a time zone that is none": stating(TimezoneOffsetFromUTC="CET"),
    "a character set that is none": stating(SpecificCharacterSet="ISO_IR_100"),
    "almost nothing": without(
        *("PatientSex", "ReferringPhysicianName", "PatientBirthDate", "BodyPartExamined", "Manufacturer", "KVP"),
        *("ImageType", "PatientPosition", "PositionReferenceIndicator", "SliceThickness", "InstanceNumber"),
    ),
}


@pytest.mark.peer("dciodvfy")
@pytest.mark.parametrize("name", CLEAN)
def test_what_the_source_lacks_does_not_make_the_result_wrong(tmp_path, tool, name):
    case = make_case(tmp_path, edit=CLEAN[name])

    for path in case.written(tmp_path / "results"):
        assert complaints(tool("dciodvfy"), path) == []


@pytest.mark.peer("segimage2itkimage")
def test_orientations_equal_but_for_rounding_make_one_segmentation(tmp_path, tool):
    def edit(dataset: Dataset) -> None:
        dataset.ImageOrientationPatient = [1, 1e-5 * (int(dataset.InstanceNumber) % 3), 0, 0, 1, 0]
        dataset.PixelSpacing = [8.0, 6.8 + 1e-5 * (int(dataset.InstanceNumber) % 2)]

    case = make_case(tmp_path, edit=edit)

    assert len(case.volume.source.frames) == len(case.paths)
    seg, *_ = case.written(tmp_path / "results")
    done = subprocess.run(
        [tool("segimage2itkimage"), "--inputDICOM", seg, "--outputDirectory", tmp_path, "-t", "nrrd"],
        capture_output=True,
    )
    assert done.returncode == 0


def test_an_element_that_nobody_can_read_is_left_out(tmp_path):
    case = make_case(tmp_path, edit=stating(PatientWeight="70.5", StudyDescription="Thorax"))
    for path in case.paths:
        path.write_bytes(path.read_bytes().replace(b"70.5", b"70,5", 1))

    broken = encode_case(case.phantom, case.paths)

    for result in broken.results:
        assert "PatientWeight" not in result.dataset
        assert result.dataset.StudyDescription == "Thorax"


@pytest.mark.parametrize(("offset", "wanted"), [("+0900", "233005"), ("-0500", "093005")])
def test_times_are_by_the_clock_that_the_object_states(tmp_path, offset, wanted):
    case = make_case(tmp_path, edit=stating(TimezoneOffsetFromUTC=offset))  # made at 14:30:05 UTC

    for result in case.results:
        assert result.dataset.TimezoneOffsetFromUTC == offset
        assert result.dataset.ContentTime == result.dataset.SeriesTime == wanted


def test_loss_is_told_where_only_the_transfer_syntax_says_it(tmp_path):
    from pydicom.uid import JPEGLSNearLossless

    from dicom_node.results.header import prepared

    case = make_case(tmp_path)
    header = case.volume.source.datasets[0]
    header.file_meta.TransferSyntaxUID = JPEGLSNearLossless

    assert prepared(case.volume.source).images[0].LossyImageCompression == "01"
    assert "LossyImageCompression" not in header


def test_a_localizer_in_the_series_is_no_part_of_the_result(tmp_path):
    case = make_case(tmp_path)
    first = dcmread(case.paths[0])
    first.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    first.SOPInstanceUID = first.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    first.save_as(tmp_path / "localizer.dcm", enforce_file_format=True)

    with_localizer = encode_case(case.phantom, [*case.paths, tmp_path / "localizer.dcm"])

    assert len(with_localizer.volume.notes) == 1
    for result, other in zip(with_localizer.results, case.results, strict=True):
        assert "1.2.3.4" not in str(result.dataset)
        if result.kind == "seg":
            assert result.dataset.PixelData.read() == other.dataset.PixelData.read()
