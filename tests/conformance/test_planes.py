"""A segmentation written plane by plane is the one that highdicom makes, element for element."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import RLELossless

from dicom_node.errors import ResultRefused
from dicom_node.forms import Form
from dicom_node.results import encode_all, planes, seg
from dicom_node.results.header import Images, prepared
from dicom_node.results.layers import Layers
from dicom_node.selfcheck import require_sound
from tests.conformance.cases import GEOMETRIES, context, encoded, make_case, manifest
from tests.datasets import ct, write
from workers import plain
from workers.findings_of import findings_of
from workers.prediction import Prediction
from workers.volume import load

OF_THE_MOMENT = ("DimensionOrganizationUID", "ContributionDateTime")  # made anew by every call
FORMS = [Form("BINARY"), Form("LABELMAP"), Form("BINARY", 3), Form("LABELMAP", 3)]


def elements(dataset: Dataset, of: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for element in dataset:
        name = f"{of}{element.tag}"
        if element.VR == "SQ":
            found[name] = len(element.value)
            for number, item in enumerate(element.value):
                found |= elements(item, f"{name}[{number}].")
        elif element.keyword not in OF_THE_MOMENT:
            found[name] = (element.VR, element.value)
    return found


def written(case, form) -> list[bytes]:
    results = encode_all(["seg"], case.findings, case.volume.source, case.context, [form])
    return [encoded(result.dataset) for result in results]


def assert_same_in_every_form(case, monkeypatch) -> None:
    for form in FORMS:
        with monkeypatch.context() as patched:
            assert_same(case, patched, form)


def assert_same(case, monkeypatch, form) -> None:
    seeds = []
    of_planes = planes.of_planes
    monkeypatch.setattr(seg, "of_planes", lambda *given: seeds.append(given) or of_planes(*given))
    ours = written(case, form)
    assert len(seeds) == len(ours) > 0
    monkeypatch.setattr(seg, "is_series_of_planes", lambda headers: False)
    theirs = written(case, form)
    assert len(seeds) == len(ours)

    for content, other in zip(ours, theirs, strict=True):
        mine, expected = dcmread(BytesIO(content)), dcmread(BytesIO(other))
        assert elements(mine.file_meta) == elements(expected.file_meta)
        assert elements(mine) == elements(expected)
        assert np.array_equal(mine.pixel_array, expected.pixel_array)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_element_is_the_same_in_every_geometry(case_of, monkeypatch, geometry):
    assert_same_in_every_form(case_of(geometry), monkeypatch)


@pytest.mark.parametrize("size", [(40, 48), (39, 51)], ids=["whole bytes a row", "no whole bytes a frame"])
def test_every_element_is_the_same_whatever_the_size_of_a_frame(tmp_path, monkeypatch, size):
    def cropped(dataset):
        pixels = np.frombuffer(dataset.PixelData, "<i2").reshape(dataset.Rows, dataset.Columns)
        dataset.Rows, dataset.Columns = size
        dataset.PixelData = pixels[: size[0], : size[1]].tobytes() + b"\0" * (size[0] * size[1] % 2)

    assert_same_in_every_form(make_case(tmp_path, "oblique", edit=cropped), monkeypatch)


@pytest.mark.parametrize("spacing", [20.0, -20.0, None])
def test_every_element_is_the_same_whatever_the_source_says_of_its_spacing(tmp_path, monkeypatch, spacing):
    def stated(dataset):
        if spacing is not None:
            dataset.SpacingBetweenSlices = spacing
        dataset.ImagePositionPatient = [f"{value:.9f}"[:16] for value in dataset.ImagePositionPatient]

    assert_same_in_every_form(make_case(tmp_path, "axial", edit=stated), monkeypatch)


@pytest.mark.parametrize("slices", [1, 2])
def test_a_label_map_of_frames_of_an_odd_size_is_written(tmp_path, slices):
    """GDCM's run-length encoder ends the whole process over them."""
    paths = []
    for number in range(1, slices + 1):
        dataset = ct(number)
        dataset.Rows, dataset.Columns, dataset.PixelData = 13, 15, bytes(13 * 15 * 2)
        paths.append(write(dataset, tmp_path / f"{number}.dcm"))
    volume = load(paths)
    labels = np.zeros((slices, 13, 15), np.uint8)
    labels[-1, 2:5, 3:14] = 1
    findings = findings_of(Prediction(labels=labels), volume, manifest(nodules=False), context())

    [made] = encode_all(["seg"], findings, volume.source, context(), [Form("LABELMAP")])

    read = dcmread(BytesIO(encoded(made.dataset)))
    assert read.file_meta.TransferSyntaxUID == RLELossless
    assert np.array_equal(read.pixel_array, labels[-1])


@pytest.mark.parametrize("form", [Form("BINARY"), Form("LABELMAP")])
def test_what_is_too_long_for_native_pixel_data_is_one_segmentation_for_each_structure(case_of, monkeypatch, form):
    case = case_of("axial")
    layers, whole = Layers(case.findings), written(case, form)
    frames = [layers[each.layer].count(each.value) for each in case.findings.segments]
    image = case.volume.source.datasets[0]
    a_frame = image.Rows * image.Columns // 8

    monkeypatch.setattr(seg, "_LONGEST", a_frame * max(frames))
    parts = written(case, form)

    assert len(whole) < len(frames)
    if form.segmentation_type == "LABELMAP":
        assert len(parts) == len(whole)
        return
    assert [int(dcmread(BytesIO(part)).NumberOfFrames) for part in parts] == frames
    monkeypatch.setattr(seg, "_LONGEST", a_frame * max(frames) - 1)
    with pytest.raises(ResultRefused, match="only as LABELMAP"):
        written(case, form)


def test_a_series_of_two_slices_is_left_to_highdicom(case_of):
    case = case_of()

    def of_the_first(count):
        source = case.volume.source
        return replace(source, datasets=source.datasets[:count], known=source.instances[:count])

    assert not planes.is_series_of_planes(prepared(of_the_first(2)))
    assert planes.is_series_of_planes(prepared(of_the_first(3)))


def edited(source, edit):
    """The source as if its headers had been edited, each known by itself alone."""
    datasets = [deepcopy(dataset) for dataset in source.datasets]
    for number, dataset in enumerate(datasets):
        edit(number, dataset)
    return replace(source, datasets=datasets, known=None)


def test_no_header_is_made_ready_only_to_see_that_all_are_alike(case_of, monkeypatch):
    headers = prepared(edited(case_of().volume.source, lambda number, dataset: None))
    monkeypatch.setattr(Images, "make", lambda self, number: pytest.fail(f"header {number} is made ready"))

    assert len(headers.instances) > 10
    assert planes.is_series_of_planes(headers)


@pytest.mark.parametrize(
    ("keyword", "value", "expected"),
    [
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.4", False),
        ("Rows", 7, False),
        ("Columns", 7, False),
        ("FrameOfReferenceUID", "1.2.3", False),
        ("FrameOfReferenceUID", None, False),
        ("NumberOfFrames", 2, False),
        ("NumberOfFrames", 1, True),
        ("ImagePositionPatient", None, False),
        ("ImageOrientationPatient", [1, 0, 0, 0, 0.999999, 0.0001], True),  # rounding: all become the first's
        ("SliceThickness", 7, True),
    ],
)
def test_one_header_that_says_something_else(case_of, keyword, value, expected):
    def edit(number, dataset):
        if number != 2:
            return
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)

    assert planes.is_series_of_planes(prepared(edited(case_of().volume.source, edit))) is expected


@pytest.mark.parametrize(("keyword", "expected"), [("FrameOfReferenceUID", True), ("ImageOrientationPatient", False)])
def test_what_no_header_says(case_of, keyword, expected):
    def edit(number, dataset):
        del dataset[keyword]

    assert planes.is_series_of_planes(prepared(edited(case_of().volume.source, edit))) is expected


def test_of_a_plain_series_only_the_headers_of_key_images_are_read(case_of, monkeypatch):
    case = case_of("axial")
    source = load(case.paths).source
    read = []
    original = plain.read_header
    monkeypatch.setattr(plain, "read_header", lambda path: read.append(path) or original(path))

    results = encode_all(["seg", "sr"], case.findings, source, case.context)
    require_sound([encoded(result.dataset) for result in results], source)

    drawn_on = len({frame for frame in (Layers(case.findings).box_of(each).frame for each in case.findings.segments)})
    assert {result.kind for result in results} == {"seg", "sr"}
    assert len(set(read)) <= drawn_on + 1, "the second image tells highdicom how far apart they are"
    assert len(set(read)) < len(case.paths) - 1
