"""What was looked for and not found is said, and said apart from everything that viewers draw."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dicom_node.findings import Code
from dicom_node.results import encode_all
from tests.conformance.cases import context
from tests.conformance.test_results import complaints, groups_of

FRACTURE = Code("125605004", "SCT", "Fracture of bone")


def test_organs_and_a_negative_answer_are_two_reports(case_of):
    case = case_of(found=False)

    drawn, negative = case.of("sr")

    assert len(groups_of(drawn)) == 4
    assert [meanings(group) for group in groups_of(negative)] == [{"Nodule", "Absent"}]
    assert drawn.SeriesInstanceUID != negative.SeriesInstanceUID
    assert (drawn.SeriesNumber, negative.SeriesNumber) == (9010, 9011)


def meanings(group):
    codes = {item.ConceptCodeSequence[0].CodeMeaning for item in group.ContentSequence if item.ValueType == "CODE"}
    return codes & {"Nodule", "Absent", "Fracture of bone"}


def test_one_thing_found_and_another_not_are_two_reports(case_of):
    case = case_of()
    wider = replace(case.findings, looked_for=(*case.findings.looked_for, FRACTURE))

    results = encode_all(("seg", "sr"), wider, case.volume.source, context())

    drawn, negative = (result.dataset for result in results if result.kind == "sr")
    assert all("Absent" not in meanings(group) for group in groups_of(drawn))
    assert [meanings(group) for group in groups_of(negative)] == [{"Fracture of bone", "Absent"}]


@pytest.mark.parametrize("kind", [{}, {"found": False}, {"organs": False}, {"organs": False, "found": False}])
def test_no_report_mixes_groups_that_draw_with_groups_that_do_not(case_of, kind):
    """One widespread viewer loses every group that stands before one without coordinates."""
    for report in case_of(**kind).of("sr"):
        drawn, others = set(), set()
        for group in groups_of(report):
            uid = next(item.UID for item in group.ContentSequence if item.ValueType == "UIDREF")
            (drawn if any(item.ValueType == "SCOORD" for item in group.ContentSequence) else others).add(uid)
        assert not drawn or others <= drawn


@pytest.mark.peer("dciodvfy")
@pytest.mark.peer("tid1500reader")
def test_the_validators_take_both_reports(case_of, tmp_path, tool):
    import subprocess

    for path in case_of(found=False).written(tmp_path / "results"):
        assert complaints(tool("dciodvfy"), path) == []
        if path.name.startswith("sr"):
            done = subprocess.run(
                [tool("tid1500reader"), "--inputDICOM", path, "--outputMetadata", tmp_path / "m.json"]
            )
            assert done.returncode == 0
