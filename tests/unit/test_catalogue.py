from __future__ import annotations

import hashlib

import pytest

from dicom_node.catalogue import read_catalogue, read_model, suggestion
from dicom_node.errors import SettingsError
from tests.unit.test_config import MANIFEST


@pytest.fixture
def models(tmp_path):
    for name in ("ct_lung", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.toml").write_text(MANIFEST.replace("ct_lung", name))
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_every_folder_with_a_manifest_is_a_model_and_no_other(models):
    assert list(read_catalogue(models)) == ["ct_lung", "other"]


def test_the_digest_is_that_of_the_manifest(models):
    found = read_model(models / "ct_lung")

    assert found.digest == hashlib.sha256(MANIFEST.encode()).hexdigest()
    assert found.manifest.name == "ct_lung"


def test_a_model_bears_the_name_of_its_folder(models):
    (models / "ct_lung").rename(models / "renamed")

    with pytest.raises(SettingsError, match=r"renamed/model\.toml: name: 'ct_lung' is not the name of its folder"):
        read_catalogue(models)


def test_a_mistake_names_file_and_key(models):
    (models / "other" / "model.toml").write_text(
        MANIFEST.replace("ct_lung", "other").replace("schema = 1", "schema = 9")
    )

    with pytest.raises(SettingsError, match=r"other/model\.toml: schema"):
        read_catalogue(models)


def test_a_folder_that_is_not_there_has_no_models(tmp_path):
    assert not read_catalogue(tmp_path / "absent")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"absent/model\.toml: No such file"):
        read_model(tmp_path / "absent")


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("prot", ["port", "host"], ' (did you mean "port"?)'),
        ("zzz", ["port", "host"], " (there is: host, port)"),
        ("zzz", [], " (there is none)"),
    ],
)
def test_the_nearest_word_is_suggested_or_all_there_are(word, known, expected):
    assert suggestion(word, known) == expected
