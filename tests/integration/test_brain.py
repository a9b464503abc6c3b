"""Brains in real heads: plausible, on their own side however the patient lies, and none in a melon."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from dicom_node.catalogue import default_folder, read_model
from dicom_node.cli import app
from dicom_node.demo.phantom import dice
from dicom_node.errors import ModelRefused, NotApplicable
from workers.bundle import Bundles
from workers.fitness import check_input
from workers.guarding import guarded
from workers.quantities import volumes_by_value
from workers.volume import load

MODELS = default_folder()


def nothing(part: float) -> None:
    """A progress that nobody watches."""


@pytest.fixture(scope="module")
def mr_brain():
    bundles = Bundles(device="cpu")
    try:
        return bundles.get(MODELS / "mr_brain")
    except ModelRefused as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["head_mr_t1_sagittal", "enhanced_mr_t1"])
def head(request, shared_data):
    return load(sorted((shared_data / request.param / "series").glob("*.dcm")))


@pytest.fixture(scope="module")
def brain(mr_brain, head):
    return guarded(mr_brain.model(head.grid, nothing), head.grid, mr_brain.manifest)


def test_a_brain_has_a_brain_s_volume(mr_brain, head, brain):
    check_input(head, mr_brain.manifest.input)

    assert 1000 < volumes_by_value(brain.labels, head.grid)[1] / 1000 < 1900
    assert brain.certainty[1] > 0.9


def test_the_mask_keeps_to_the_side_of_what_it_shows(mr_brain, head, brain):
    """A third of the left hemisphere is wiped out: the mask loses more on the left than on the right."""
    values = head.grid.values.copy()
    k, j = (slice(n // 3, 2 * n // 3) for n in head.grid.shape[:2])
    left = slice(head.grid.shape[2] // 2 + head.grid.shape[2] // 12, None)
    values[k, j, left] = values.min()

    wiped = mr_brain.model(replace(head.grid, values=values), nothing).labels

    lost = (brain.labels == 1) & (wiped == 0)
    middle = head.grid.shape[2] // 2
    assert lost[:, :, middle:].sum() > 5 * lost[:, :, :middle].sum()


def test_a_mirrored_head_has_a_mirrored_brain(mr_brain, head, brain):
    mirrored = replace(head.grid, values=np.ascontiguousarray(head.grid.values[:, :, ::-1]))

    again = mr_brain.model(mirrored, nothing).labels[:, :, ::-1]

    assert dice(again == 1, brain.labels == 1) > 0.97


@pytest.fixture(scope="module")
def straight(mr_brain, shared_data):
    """A head, its files, and its brain on its images."""
    paths = sorted((shared_data / "head_mr_t1_sagittal" / "series").glob("*.dcm"))
    volume = load(paths)
    return volume, paths, volume.to_source(mr_brain.model(volume.grid, nothing).labels)


@pytest.mark.parametrize("turned", [("rows",), ("columns",), ("rows", "columns")], ids=" and ".join)
def test_images_stored_another_way_round_have_the_same_brain(mr_brain, straight, tmp_path, turned):
    """A head scanned feet first or prone: its images run the other way, and say so; the patient's brain stays."""
    volume, paths, found = straight
    for path in paths:
        turn(pydicom.dcmread(path), turned).save_as(tmp_path / path.name)
    other = load(sorted(tmp_path.glob("*.dcm")))

    again = other.to_source(mr_brain.model(other.grid, nothing).labels)

    place = {str(volume.source.dataset_of(n).SOPInstanceUID): n for n in range(len(found))}
    order = [place[str(other.source.dataset_of(n).SOPInstanceUID)] for n in range(len(again))]
    back = again[:, :: -1 if "rows" in turned else 1, :: -1 if "columns" in turned else 1]
    assert found.any()
    assert np.array_equal(back, found[order])


def turn(dataset, turned):
    """Return an image whose rows or columns run the other way, each pixel where it was in the patient."""
    pixels = dataset.pixel_array
    along, down = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    first = np.array(dataset.ImagePositionPatient, float)
    if "rows" in turned:
        first = first + down * float(dataset.PixelSpacing[0]) * (dataset.Rows - 1)
        pixels, down = pixels[::-1], -down
    if "columns" in turned:
        first = first + along * float(dataset.PixelSpacing[1]) * (dataset.Columns - 1)
        pixels, along = pixels[:, ::-1], -along
    dataset.PixelData = np.ascontiguousarray(pixels).tobytes()
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(first), [*along, *down]
    return dataset


def test_a_melon_has_no_brain(mr_brain, head):
    k, j, i = np.indices(head.grid.shape)
    places = [(n - 1) / 2 for n in head.grid.shape]
    radii = [min(70.0 / step, 0.45 * n) for step, n in zip(head.grid.spacing, head.grid.shape, strict=True)]
    distance = sum(((x - c) / r) ** 2 for x, c, r in zip((k, j, i), places, radii, strict=True))
    random = np.random.default_rng(0)
    texture = ndimage.gaussian_filter(random.normal(size=head.grid.shape), 3)
    values = np.where(distance < 1, 600 + 80 * texture / texture.std() + 150 * (distance < 0.15), 0.0)
    values += np.abs(random.normal(size=head.grid.shape, scale=10))

    melon = replace(head.grid, values=values.astype(np.float32))

    with pytest.raises(NotApplicable) as caught:
        guarded(mr_brain.model(melon, nothing), melon, mr_brain.manifest)

    assert caught.value.reason in ("nothing_around", "volume_out_of_range")


def test_published_weights_are_installed_from_a_folder_and_only_those(shared_data, tmp_path):
    folder = tmp_path / "models" / "brain_mask"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text((MODELS / "brain_mask" / "model.toml").read_text())
    settings = tmp_path / "node.toml"
    settings.write_text('[node]\nmodels = "models"\nstorage = "storage"\n')
    published = shared_data / "brainchop" / "mindgrab"

    def run(*arguments: str):
        return CliRunner().invoke(app, ["models", *arguments, "--settings", str(settings)])

    assert "models add brain_mask" in run("list").stdout.replace("\n", " ")
    (listed,) = json.loads(run("list", "--json").stdout)
    assert listed["digest"] == read_model(folder).digest
    assert listed["missing"] == ["mindgrab.safetensors"]
    with pytest.raises(ModelRefused, match="models add brain_mask"):
        Bundles(device="cpu").get(folder)

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in published.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:-1] + b"x")
    refused = run("add", "brain_mask", "--from", str(broken))
    assert isinstance(refused.exception, ModelRefused)
    assert not list(folder.glob("*.safetensors"))

    added = run("add", "brain_mask", "--from", str(published))

    assert added.exit_code == 0, added.stdout
    assert "installed" in run("list").stdout
    bundles = Bundles(device="cpu")
    assert bundles.get(folder).manifest.name == "brain_mask"
    bundles.close()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("series", "least", "most"), [("head_mr_t1_sagittal", 1450, 1650), ("head_ct_ge_tilted", 1300, 1550)]
)
def test_brain_mask_finds_the_brain_in_ct_and_mr(shared_data, tmp_path, request, series, least, most):
    folder = tmp_path / "brain_mask"
    folder.mkdir()
    (folder / "model.toml").write_text((MODELS / "brain_mask" / "model.toml").read_text())
    CliRunner().invoke(app, ["models", "add", str(folder), "--from", str(shared_data / "brainchop" / "mindgrab")])
    manifest = read_model(folder).manifest
    volume = load(sorted((shared_data / series / "series").glob("*.dcm")), manifest.input)
    check_input(volume, manifest.input)
    bundles = Bundles(device="cpu")

    prediction = guarded(bundles.get(folder).model(volume.grid, nothing), volume.grid, manifest)

    assert least < volumes_by_value(prediction.labels, volume.grid)[1] / 1000 < most
    if series == "head_mr_t1_sagittal":  # another network, from other hands, says the same
        other = request.getfixturevalue("mr_brain").model(volume.grid, nothing).labels
        assert dice(prediction.labels == 1, other == 1) > 0.95
    bundles.close()
