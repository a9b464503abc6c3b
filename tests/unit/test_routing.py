from __future__ import annotations

from dataclasses import replace

import pytest

from dicom_node.attributes import attributes_of, read_attributes
from dicom_node.errors import InputRefused
from dicom_node.routing import CALLING_AE_TITLE, Mismatch, Order, Priority, Route, match, mismatches
from tests.datasets import ct, write

CHEST = {"Modality": ("CT",), "BodyPartExamined": ("CHEST",), "ImageType": ("ORIGINAL", "PRIMARY", "AXIAL")}


def route(name="r", run=("ct_lung",), send_to=("PACS",), **when) -> Route:
    return Route(name, when, run, send_to)


def test_a_pattern_must_match_the_whole_value_in_any_case():
    assert not mismatches(route(BodyPartExamined="chest|thorax"), CHEST)
    assert mismatches(route(BodyPartExamined="CHES"), CHEST)


def test_every_condition_must_be_met_and_each_that_is_not_is_named():
    misses = mismatches(route(Modality="MR", BodyPartExamined="CHEST", StudyDescription=".+"), CHEST)

    assert misses == (Mismatch("Modality", "MR", "CT"), Mismatch("StudyDescription", ".+", ""))


@pytest.mark.parametrize("pattern", ["AXIAL", r"ORIGINAL\\PRIMARY\\.*"])
def test_of_several_values_one_matches_or_all_of_them_joined(pattern):
    assert not mismatches(route(ImageType=pattern), CHEST)


def test_an_absent_element_is_empty_and_a_pattern_can_ask_for_that():
    assert not mismatches(route(ContrastBolusAgent=""), CHEST)
    assert mismatches(route(ContrastBolusAgent=".+"), CHEST)


def test_a_route_without_conditions_matches_everything():
    assert not mismatches(route(), {})


def test_one_model_runs_once_for_all_routes_that_want_it():
    routes = [
        route("a", run=("ct_lung", "nodule"), send_to=("PACS",)),
        route("b", send_to=("ARCHIVE", "PACS")),
        route("c", run=("other",), Modality="MR"),
    ]

    orders = match(routes, CHEST)

    assert orders == (
        Order("ct_lung", ("PACS", "ARCHIVE"), ("a", "b")),
        Order("nodule", ("PACS",), ("a",)),
    )


def test_a_header_becomes_text_by_keyword_and_the_sender_is_one_more_key(tmp_path):
    dataset = ct(ImageType=["ORIGINAL", "PRIMARY"], KVP="120", StudyDescription="")

    attributes = read_attributes(write(dataset, tmp_path / "a.dcm"), "SCANNER")

    assert attributes["ImageType"] == ("ORIGINAL", "PRIMARY")
    assert attributes["KVP"] == ("120",)
    assert attributes[CALLING_AE_TITLE] == ("SCANNER",)
    assert "StudyDescription" not in attributes
    assert "PixelData" not in attributes


def test_a_malformed_element_matches_nothing_and_hurts_nothing():
    dataset = ct()
    dataset.add_new(0x00181151, "IS", "1")
    dataset["XRayTubeCurrent"]._value = object()

    assert attributes_of(dataset)["Modality"] == ("CT",)


@pytest.mark.parametrize("content", [b"", b"no DICOM at all" * 50, None], ids=["empty", "garbage", "absent"])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.dcm"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(InputRefused, match=r"broken\.dcm"):
        read_attributes(path)


def test_of_several_routes_to_one_model_the_most_urgent_counts():
    routes = [
        replace(route("screening"), priority=Priority.BACKGROUND),
        replace(route("stroke", BodyPartExamined="HEAD"), priority=Priority.URGENT),
    ]

    (urgent,), (background,) = match(routes, {"BodyPartExamined": ["HEAD"]}), match(routes, {})

    assert (urgent.priority, background.priority) == (Priority.URGENT, Priority.BACKGROUND)
