"""A segmentation written plane by plane is the one that highdicom makes, element for element."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import RLELossless

from dicom_node.forms import Form
from dicom_node.results import encode_all, planes, seg
from tests.conformance.cases import GEOMETRIES, context, encoded, make_case, manifest
from tests.datasets import ct, write
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
    monkeypatch.setattr(seg, "is_series_of_planes", lambda images: False)
    theirs = written(case, form)
    assert len(seeds) == len(ours)

    for content, other in zip(ours, theirs, strict=True):
        mine, expected = dcmread(BytesIO(content)), dcmread(BytesIO(other))
        assert elements(mine.file_meta) == elements(expected.file_meta)
        assert elements(mine) == elements(expected)
        assert np.array_equal(mine.pixel_array, expected.pixel_array)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_element_is_the_same_in_every_geometry(tmp_path, monkeypatch, geometry):
    assert_same_in_every_form(make_case(tmp_path, geometry), monkeypatch)


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


def test_a_series_of_two_slices_is_left_to_highdicom(tmp_path):
    case = make_case(tmp_path)

    assert not planes.is_series_of_planes(list(case.volume.source.datasets[:2]))
    assert planes.is_series_of_planes(list(case.volume.source.datasets[:3]))
