"""SEG and SR by the acceptance checklist: validators, readers, references, labels, codes."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from highdicom.sr import srread
from pydicom import Dataset, dcmread
from pydicom.sr._concepts_dict import concepts

from dicom_node.labelling import Predecessor
from tests.conformance.cases import encode_case, enhanced_from, make_case

DEVICE_UID = re.compile(r"\(0x0018,0x1002\) UI Device UID|this is a Standard Extended SOP Class")
KINDS = {
    "both": {},
    "organs only": {"nodules": False},
    "nodules only": {"organs": False},
    "boxes only": {"organs": False, "outline": False},
    "nothing found": {"organs": False, "found": False},
}


@pytest.fixture(params=KINDS)
def case(case_of, request):
    return case_of("axial", **KINDS[request.param])


def complaints(tool: str, *paths) -> list[str]:
    done = subprocess.run([tool, *map(str, paths)], capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if re.match("Error|Warning|Abort", line) and not DEVICE_UID.search(line)]


# -- validators ---------------------------------------------------------------------------------------------------


@pytest.mark.peer("dciodvfy")
def test_dciodvfy_has_nothing_to_say(case, tmp_path, tool):
    for path in case.written(tmp_path / "results"):
        assert complaints(tool("dciodvfy"), path) == []


@pytest.mark.peer("dciodvfy")
@pytest.mark.parametrize("geometry", ["oblique", "tilted", "uneven", "sagittal"])
def test_dciodvfy_has_nothing_to_say_about_any_geometry(case_of, tmp_path, tool, geometry):
    case = case_of(geometry)

    for path in case.written(tmp_path / "results"):
        assert complaints(tool("dciodvfy"), path) == []


@pytest.mark.peer("dciodvfy")
def test_dciodvfy_has_nothing_to_say_about_results_of_an_enhanced_object(case_of, tmp_path, tool):
    classic = case_of("axial")
    case = encode_case(classic.phantom, [enhanced_from(classic.paths, tmp_path)])

    for path in case.written(tmp_path / "results"):
        assert complaints(tool("dciodvfy"), path) == []


@pytest.mark.peer("dciodvfy")
def test_the_validator_would_complain(case_of, tmp_path, tool):
    """The control of the tests above."""
    case = case_of("axial")
    seg, *_ = case.written(tmp_path / "results")
    broken = dcmread(seg)
    del broken.ContentLabel
    broken.save_as(seg)

    assert complaints(tool("dciodvfy"), seg) != []


@pytest.mark.peer("dcentvfy")
def test_dcentvfy_finds_every_reference(case, tmp_path, tool):
    results = case.written(tmp_path / "results")

    found = complaints(tool("dcentvfy"), *case.paths, *results)

    assert [line for line in found if line.startswith("Error")] == []


@pytest.mark.peer("dsrdump")
def test_dsrdump_reads_the_report_and_names_model_and_findings(case_of, tmp_path, tool):
    case = case_of("axial")
    report = case.written(tmp_path / "results")[-1]

    done = subprocess.run([tool("dsrdump"), "-q", report], capture_output=True, text=True)

    assert done.returncode == 0
    for expected in ("ct_lung", "1.0.0", "Nodule 1", "Right lung", "Left lung"):
        assert expected in done.stdout


@pytest.mark.peer("tid1500reader")
def test_dcmqi_reads_every_measurement_as_the_model_made_it(case_of, tmp_path, tool):
    case = case_of("axial")
    report = case.written(tmp_path / "results")[-1]
    output = tmp_path / "read.json"

    done = subprocess.run([tool("tid1500reader"), "--inputDICOM", report, "--outputMetadata", output])

    assert done.returncode == 0
    groups = {
        group["TrackingIdentifier"]: {
            item["quantity"]["CodeMeaning"]: (float(item["value"]), item["units"]["CodeValue"])
            for item in group["measurementItems"]
        }
        for group in json.loads(output.read_text())["Measurements"]
        if group["measurementItems"]
    }
    assert groups["Nodule 1"] == {
        "Certainty of Finding": (83.0, "%"),
        "Volume": (0.8123, "cm3"),
        "Diameter": (11.58, "mm"),
    }
    for segment in case.findings.segments[:2]:
        assert groups[segment.label]["Volume"] == (segment.measurements[0].value, "cm3")


# -- the report ---------------------------------------------------------------------------------------------------


def test_highdicom_reads_a_box_and_a_segment_for_everything(case_of, tmp_path):
    case = case_of("axial")
    path = case.written(tmp_path / "results")[-1]

    content = srread(path).content

    planar, volumetric = content.get_planar_roi_measurement_groups(), content.get_volumetric_roi_measurement_groups()
    assert len(planar) == len(volumetric) == 3
    assert {group.tracking_uid for group in planar} == {group.tracking_uid for group in volumetric}


def test_every_group_that_has_no_coordinates_has_a_sibling_that_has(case):
    (report,) = case.of("sr")
    drawn: Counter[str] = Counter()
    silent: set[str] = set()
    for group in groups_of(report):
        (uid,) = tracking_uids(group)
        if any(item.ValueType == "SCOORD" for item in group.ContentSequence):
            drawn[uid] += 1
        else:
            silent.add(uid)

    assert set(drawn.values()) <= {1}
    assert silent <= set(drawn) or (case.findings.is_negative and not drawn)


def test_a_box_carries_no_number_unless_the_number_has_its_own_coordinates(case):
    (report,) = case.of("sr")
    for group in groups_of(report):
        if any(item.ValueType == "SCOORD" for item in group.ContentSequence):
            for number in (item for item in group.ContentSequence if item.ValueType == "NUM"):
                assert [child.RelationshipType for child in number.ContentSequence if child.ValueType == "SCOORD"] == [
                    "INFERRED FROM"
                ]


def test_the_box_is_the_closed_outline_of_the_mask_on_its_slice(case_of):
    case = case_of("axial")
    (report,) = case.of("sr")
    (finding,) = case.findings.findings
    mask = case.findings.labels[1][finding.box.frame] > 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))

    region = next(item for item in groups_of(report)[0].ContentSequence if item.ValueType == "SCOORD")
    points = np.array(region.GraphicData).reshape(-1, 2)

    assert region.GraphicType == "POLYLINE"
    assert len(points) == 5
    assert points[0].tolist() == points[-1].tolist()
    assert points[:4].tolist() == [
        [columns[0], rows[0]],
        [columns[-1] + 1, rows[0]],
        [columns[-1] + 1, rows[-1] + 1],
        [columns[0], rows[-1] + 1],
    ]
    image = region.ContentSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert image == case.volume.source.dataset_of(finding.box.frame).SOPInstanceUID


def test_a_negative_study_has_a_report_that_says_so_and_no_seg(case_of):
    case = case_of("axial", organs=False, found=False)

    (report,) = case.of("sr")

    assert case.of("seg") == []
    (group,) = groups_of(report)
    values = {code.CodeMeaning for item in group.ContentSequence for code in item.get("ConceptCodeSequence", ())}
    assert {"Absent", "Nodule"} <= values


def test_the_report_is_preliminary_unverified_and_made_by_a_device(case):
    (report,) = case.of("sr")

    assert (report.CompletionFlag, report.PreliminaryFlag, report.VerificationFlag) == (
        "COMPLETE",
        "PRELIMINARY",
        "UNVERIFIED",
    )
    assert "VerifyingObserverSequence" not in report
    observers = [
        item.ConceptCodeSequence[0].CodeMeaning
        for item in report.ContentSequence
        if item.get("ConceptNameCodeSequence") and item.ConceptNameCodeSequence[0].CodeMeaning == "Observer Type"
    ]
    assert observers == ["Device"]


def test_evidence_lists_the_images_before_the_segmentation(case_of):
    case = case_of("axial")
    (report,) = case.of("sr")

    series = [
        item.SeriesInstanceUID for item in report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
    ]

    assert series[0] == case.volume.source.datasets[0].SeriesInstanceUID


def test_a_later_report_names_the_one_that_it_supersedes(case_of, tmp_path):
    study = case_of("axial").volume.source.datasets[0].StudyInstanceUID
    earlier = Predecessor("1.2.840.10008.5.1.4.1.1.88.34", "1.2.3.4", "1.2.3", str(study))

    case = make_case(tmp_path, "axial", predecessors=(earlier,))

    (report,) = case.of("sr")
    (predecessor,) = report.PredecessorDocumentsSequence
    (series,) = predecessor.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.4"


# -- the segmentation ---------------------------------------------------------------------------------------------


def test_segments_are_numbered_without_a_gap_and_say_everything(case_of):
    case = case_of("axial")

    for segmentation in case.of("seg"):
        assert segmentation.SegmentationType == "BINARY"
        numbers = [segment.SegmentNumber for segment in segmentation.SegmentSequence]
        assert numbers == list(range(1, len(numbers) + 1))
        for segment in segmentation.SegmentSequence:
            assert segment.SegmentAlgorithmType == "AUTOMATIC"
            assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "1.0.0"
            assert len(segment.RecommendedDisplayCIELabValue) == 3
            assert segment.TrackingUID
        assert len(segmentation.ReferencedSeriesSequence) == 1


def test_sides_are_said_in_codes(case_of):
    lungs, nodules = case_of("axial").of("seg")

    sides = {
        segment.SegmentLabel: segment.SegmentedPropertyTypeCodeSequence[0]
        .SegmentedPropertyTypeModifierCodeSequence[0]
        .CodeMeaning
        for segment in lungs.SegmentSequence
    }
    assert sides == {"Right lung": "Right", "Left lung": "Left"}
    (nodule,) = nodules.SegmentSequence
    assert nodule.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0].CodeMeaning == "Right"


def test_tracking_uids_are_the_same_in_seg_and_sr(case_of):
    case = case_of("axial")
    (report,) = case.of("sr")

    in_seg = {segment.TrackingUID for seg in case.of("seg") for segment in seg.SegmentSequence}
    in_sr = {uid for group in groups_of(report) for uid in tracking_uids(group)}

    assert in_seg == in_sr


# -- identity and labels ------------------------------------------------------------------------------------------


def test_patient_and_study_are_the_source_s(case):
    source = case.volume.source.datasets[0]
    for result in case.results:
        for keyword in (
            *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"),
            *("StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription"),
        ):
            assert result.dataset.get(keyword) == source.get(keyword), keyword


def test_a_result_says_that_it_is_ai_which_model_and_which_version(case):
    for result in case.results:
        dataset = result.dataset
        assert dataset.SeriesDescription == "AI Lungs 1.0.0 - RESEARCH"
        assert dataset.ContentQualification == "RESEARCH"
        assert dataset.SeriesNumber >= 9000
        ours = [
            item for item in dataset.ContributingEquipmentSequence if item.get("ManufacturerModelName") == "ct_lung"
        ]
        assert [item.DeviceUID for item in ours] == [case.context.model.device_uid]


def test_every_code_that_is_used_exists(case):
    for result in case.results:
        for item in codes_in(result.dataset):
            annotation = item.CodeValue.startswith("{")  # highdicom's image library counts in {pixels}
            if item.CodingSchemeDesignator in ("SCT", "DCM", "UCUM", "LN") and not annotation:
                known = {value for values in concepts[item.CodingSchemeDesignator].values() for value in values}
                assert item.CodeValue in known, item
            assert item.CodingSchemeDesignator not in ("SRT", "SNM3")


NAMES = [
    ("ISO_IR 100", "Müller^Änne"),
    ("ISO_IR 144", "Люкceмбypг^Роза"),
    ("ISO_IR 126", "Διονυσιος^Α"),
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ("GB18030", "Wang^XiaoDong=王^小东"),
    ("ISO_IR 192", "Wang^XiaoDong=王^小東"),
]


@pytest.mark.parametrize(("character_set", "name"), NAMES)
def test_a_name_in_any_character_set_arrives_in_utf_8(tmp_path, character_set, name):
    def edit(dataset: Dataset) -> None:
        dataset.SpecificCharacterSet = character_set
        dataset.PatientName = name
        dataset.StudyDescription = "Thorax"

    case = make_case(tmp_path, "axial", edit=edit)

    for path in case.written(tmp_path / "results"):
        read = dcmread(path)
        assert read.SpecificCharacterSet == "ISO_IR 192"
        assert str(read.PatientName) == name


@pytest.mark.parametrize(
    "keyword",
    [
        *("PatientSex", "StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDate", "StudyTime"),
        *("PatientBirthDate", "BodyPartExamined", "PatientName", "PatientID", "PositionReferenceIndicator"),
        *("StudyDescription", "SeriesNumber", "Manufacturer", "SeriesDate", "SliceThickness", "KVP"),
    ],
)
def test_a_header_that_lacks_an_element_is_no_obstacle(tmp_path, keyword):
    def edit(dataset: Dataset) -> None:
        del dataset[keyword]

    case = make_case(tmp_path, "axial", edit=edit)

    assert {result.kind for result in case.results} == {"seg", "sr"}


def test_a_lossy_source_without_a_ratio_is_no_obstacle(tmp_path):
    def edit(dataset: Dataset) -> None:
        dataset.LossyImageCompression = "01"

    case = make_case(tmp_path, "axial", edit=edit)

    assert case.of("seg")[0].LossyImageCompression == "01"


# -- the same again -----------------------------------------------------------------------------------------------


def test_the_same_input_and_model_give_the_same_uids_and_another_model_others(tmp_path):
    first = make_case(tmp_path, "axial")
    again = make_case(tmp_path, "axial")
    other = make_case(tmp_path, "axial", model=replace(first.context.model, digest="ef" * 32))

    uids = [[str(result.dataset.SOPInstanceUID) for result in case.results] for case in (first, again, other)]

    assert uids[0] == uids[1]
    assert not set(uids[0]) & set(uids[2])


def test_the_source_is_not_changed(case_of):
    case = case_of("axial")

    for frame, dataset in enumerate(case.volume.source.datasets):
        original = next(
            read
            for read in (dcmread(path, stop_before_pixels=True) for path in case.paths)
            if read.SOPInstanceUID == dataset.SOPInstanceUID
        )
        assert dataset == original, frame


def test_an_encoded_object_reads_back_equal(case):
    for result in case.results:
        buffer = BytesIO()
        result.dataset.save_as(buffer, enforce_file_format=True)
        buffer.seek(0)
        assert dcmread(buffer).SOPInstanceUID == result.dataset.SOPInstanceUID


def tracking_uids(group: Dataset) -> list[str]:
    """The Tracking Unique Identifier (112040, DCM) of a group."""
    return [
        item.UID
        for item in group.ContentSequence
        if item.ValueType == "UIDREF" and item.ConceptNameCodeSequence[0].CodeValue == "112040"
    ]


def groups_of(report: Dataset) -> list[Dataset]:
    """The measurement groups of a TID 1500 report."""
    return [
        group
        for container in report.ContentSequence
        if container.get("ConceptNameCodeSequence") and container.ConceptNameCodeSequence[0].CodeValue == "126010"
        for group in container.ContentSequence
    ]


def codes_in(dataset: Dataset) -> list[Dataset]:
    """Every code item anywhere in a dataset that this node chose, not the source."""
    found = []
    for element in dataset:
        if element.VR == "SQ" and element.keyword not in ("ProcedureCodeSequence", "RequestAttributesSequence"):
            for item in element.value:
                if "CodeValue" in item and "CodingSchemeDesignator" in item:
                    found.append(item)
                found.extend(codes_in(item))
    return found
