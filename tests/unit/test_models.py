"""The models that come with the node, on thoraces of known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydicom.sr._concepts_dict import concepts

from dicom_node.catalogue import default_folder, read_catalogue
from dicom_node.codes import fault
from dicom_node.demo.phantom import dice, make_thorax, write_series
from dicom_node.errors import NotApplicable
from dicom_node.manifest import CodeEntry
from workers import measure
from workers.algorithms import ct_lung
from workers.algorithms.ct_lung_nodule import CtLungNodule
from workers.bundle import Bundles
from workers.volume import load

CPU = torch.device("cpu")
SMALL = {"slices": 34, "spacing": (8.0, 2.6, 2.2), "size": (124, 162)}


def nothing(part: float) -> None:
    """A progress that nobody watches."""


@pytest.fixture(scope="module")
def thorax(tmp_path_factory):
    phantom = make_thorax(**SMALL, seed=3)
    return phantom, load(write_series(phantom, tmp_path_factory.mktemp("thorax")))


@pytest.fixture(scope="module")
def fine(tmp_path_factory):
    """A thorax of fine voxels, and what the detector finds in it."""
    phantom = make_thorax(seed=4)
    volume = load(write_series(phantom, tmp_path_factory.mktemp("fine")))
    return phantom, volume, CtLungNodule(CPU, 0.5)(volume.grid, nothing)


# -- manifests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(read_catalogue(default_folder())))
def test_every_code_of_a_manifest_exists_with_its_meaning(name):
    manifest = read_catalogue(default_folder())[name].manifest
    coded = dict(manifest.codes())

    assert coded
    for key, entry in coded.items():
        assert fault(entry) == "", key
        meanings = {
            meaning
            for values in concepts[entry.scheme].values()
            for value, (meaning, _) in values.items()
            if value == entry.value
        }
        assert entry.meaning in meanings


@pytest.mark.parametrize("name", sorted(read_catalogue(default_folder())))
def test_every_model_has_a_card_of_its_version(name):
    manifest = read_catalogue(default_folder())[name].manifest

    card = (default_folder() / name / "CARD.md").read_text(encoding="utf-8")

    assert card.startswith(f"# {name} {manifest.version}")


@pytest.mark.parametrize("name", ["ct_lung", "ct_lung_nodule"])
def test_models_that_come_with_all_their_files_load(name):
    assert len(Bundles(device="cpu").get(default_folder() / name).digest) == 64


def test_a_wrong_code_is_named_with_the_right_one():
    lung = CodeEntry(value="39607008", scheme="SCT", meaning="Lungs")

    assert "means 'Lung'" in fault(lung)
    assert "is not in DICOM's lists" in fault(lung.model_copy(update={"value": "4711", "meaning": "Lungg"}))
    assert fault(lung.model_copy(update={"meaning": "Lung"})) == ""


# -- lungs --------------------------------------------------------------------------------------------------------


def test_both_lungs_are_found_on_their_own_side(thorax):
    phantom, volume = thorax

    labels = volume.to_source(ct_lung.segment(volume.grid, CPU, nothing))

    assert dice(labels == ct_lung.RIGHT, phantom.right) > 0.95
    assert dice(labels == ct_lung.LEFT, phantom.left) > 0.95


def test_a_mirrored_thorax_has_its_lungs_the_other_way_round(thorax):
    phantom, volume = thorax
    mirrored = replace(volume.grid, values=np.ascontiguousarray(volume.grid.values[:, :, ::-1]))

    labels = ct_lung.segment(mirrored, CPU, nothing)[:, :, ::-1]

    assert dice(volume.to_source(labels) == ct_lung.LEFT, phantom.right) > 0.95
    assert dice(volume.to_source(labels) == ct_lung.RIGHT, phantom.left) > 0.95


@pytest.mark.parametrize(
    "variant",
    [
        {"orientation": "reversed"},
        {"orientation": "prone"},
        {"orientation": "oblique"},
        {"tilt": 18.5},
        {"uneven": True},
    ],
    ids=["feet first", "prone", "oblique", "tilted", "uneven"],
)
def test_lungs_are_found_however_the_patient_lies(tmp_path, variant):
    phantom = make_thorax(**SMALL, **variant, seed=5)
    volume = load(write_series(phantom, tmp_path))

    labels = volume.to_source(ct_lung.segment(volume.grid, CPU, nothing))

    number = {str(d.SOPInstanceUID): int(d.InstanceNumber) - 1 for d in volume.source.datasets}
    order = [number[str(volume.source.dataset_of(frame).SOPInstanceUID)] for frame in range(len(labels))]
    assert dice(labels == ct_lung.RIGHT, phantom.right[order]) > 0.95
    assert dice(labels == ct_lung.LEFT, phantom.left[order]) > 0.95


def test_the_figures_of_the_card_are_made_by_one_command(monkeypatch, capsys):
    monkeypatch.setattr(measure, "LUNG_VARIANTS", {"feet first": {**SMALL, "orientation": "reversed"}})

    measure.measure("ct_lung", seed=5)

    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if "feet first" in line]
    right, left, *_ = (float(word) for word in row if word[0].isdigit())
    assert min(right, left) > 0.95


def test_lungs_that_touch_are_cut_apart(thorax):
    """Air across the front of the chest joins both lungs, as it does at the anterior junction line."""
    phantom, volume = thorax
    values = volume.grid.values.copy()
    k = values.shape[0] // 2 + 2
    row = int(np.flatnonzero(phantom.right[k].any(axis=1))[6])
    inner = np.flatnonzero(phantom.right[k, row])[-1], np.flatnonzero(phantom.left[k, row])[0]
    values[k : k + 2, row : row + 2, inner[0] : inner[1] + 1] = -850
    bridged = replace(volume.grid, values=values)

    labels = volume.to_source(ct_lung.segment(bridged, CPU, nothing))

    assert dice(labels == ct_lung.RIGHT, phantom.right) > 0.95
    assert dice(labels == ct_lung.LEFT, phantom.left) > 0.95


def test_trachea_and_table_are_no_lung(thorax):
    phantom, volume = thorax

    labels = volume.to_source(ct_lung.segment(volume.grid, CPU, nothing))

    lungs = phantom.right | phantom.left
    assert (labels[~lungs] > 0).sum() < 0.03 * lungs.sum()


def test_a_mass_at_the_chest_wall_belongs_to_its_lung(tmp_path):
    phantom = make_thorax(**SMALL, nodules=(((-118.0, 12.0, 20.0), 36.0),), seed=6)
    volume = load(write_series(phantom, tmp_path))

    labels = volume.to_source(ct_lung.segment(volume.grid, CPU, nothing))

    mass = phantom.right & (phantom.hu - make_thorax(**SMALL, nodules=(), seed=6).hu > 500)
    assert (labels[mass] == ct_lung.RIGHT).mean() > 0.8


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("no air at all", lambda values: np.full_like(values, 40)),
        ("only a belly", lambda values: np.where(values < -500, 40, values)),
        ("nothing but air", lambda values: np.full_like(values, -1000)),
    ],
)
def test_what_has_no_lungs_is_refused_with_a_reason(thorax, what, change):
    _, volume = thorax
    other = replace(volume.grid, values=change(volume.grid.values).astype(np.int16))

    with pytest.raises(NotApplicable) as refused:
        ct_lung.segment(other, CPU, nothing)

    assert refused.value.reason in ("organ_not_found", "volume_out_of_range")


def test_a_head_is_refused(shared_data):
    volume = load(sorted((shared_data / "head_ct_ge_tilted" / "series").glob("*.dcm")))

    with pytest.raises(NotApplicable):
        ct_lung.segment(volume.grid, CPU, nothing)


@pytest.mark.data
def test_real_lungs_are_of_a_plausible_size_and_hold_the_tumour(shared_data):
    folder = shared_data / "chest_ct_lung_dx_a0001"
    volume = load(sorted((folder / "series").glob("*.dcm")))

    labels = ct_lung.segment(volume.grid, CPU, nothing)

    millilitres = [
        float((labels == value).sum(axis=(1, 2)) @ volume.grid.thickness) * np.prod(volume.grid.spacing[1:]) / 1000
        for value in (1, 2)
    ]
    assert 2500 < millilitres[0] < 4000
    assert 1800 < millilitres[1] < 3200
    assert _share_of_boxes_in(volume, labels, folder / "tumour_boxes") > 0.5


def _share_of_boxes_in(volume, labels, folder):
    """How much of the radiologists' tumour boxes the left lung covers."""
    from xml.etree import ElementTree

    on_source = volume.to_source(labels)
    frames = {str(volume.source.dataset_of(n).SOPInstanceUID): n for n in range(len(on_source))}
    inside = total = 0
    for path in folder.glob("*.xml"):
        for box in ElementTree.parse(path).iter("bndbox"):
            left, top, right, bottom = (int(box.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax"))
            covered = on_source[frames[path.stem], top:bottom, left:right]
            inside += int((covered == ct_lung.LEFT).sum())
            total += covered.size
    return inside / total


# -- nodules ------------------------------------------------------------------------------------------------------


def test_every_nodule_is_found_where_it_is_and_nothing_else(fine):
    phantom, volume, prediction = fine

    assert len(prediction.detections) == len(phantom.nodules)
    for nodule in phantom.nodules:
        distance, found = min(
            (np.linalg.norm(_point(volume, d) - nodule.centre), n) for n, d in enumerate(prediction.detections)
        )
        detection = prediction.detections[found]
        assert distance < max(4.0, nodule.diameter / 3)
        assert detection.laterality == ("right" if nodule.centre[0] < 0 else "left")
        assert abs(detection.measurements["diameter"] - nodule.diameter) < 0.25 * nodule.diameter


def _point(volume, detection):
    grid = volume.grid
    k, j, i = detection.centre
    origin = np.array([np.interp(k, np.arange(len(grid.origins)), grid.origins[:, axis]) for axis in range(3)])
    return origin + grid.directions[1] * grid.spacing[1] * j + grid.directions[2] * grid.spacing[2] * i


def test_a_chest_without_nodules_has_none(tmp_path):
    volume = load(write_series(make_thorax(nodules=(), seed=9), tmp_path))

    prediction = CtLungNodule(CPU, 0.5)(volume.grid, nothing)

    assert prediction.detections == ()


def test_outlines_lie_in_their_boxes_and_have_their_volume(fine):
    _, volume, prediction = fine

    for detection in prediction.detections:
        outline = prediction.instances == detection.value
        box = tuple(slice(first, last) for first, last in detection.box)
        assert outline[box].sum() == outline.sum() > 0
        millimetres = float(outline.sum(axis=(1, 2)) @ volume.grid.thickness) * np.prod(volume.grid.spacing[1:])
        assert detection.measurements["volume"] == pytest.approx(millimetres)
