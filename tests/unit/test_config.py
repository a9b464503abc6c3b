from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError

from dicom_node.config import Settings, load, parse
from dicom_node.errors import SettingsError
from dicom_node.forms import Wish
from dicom_node.services import Admission

EXAMPLE = Path(__file__).parents[2] / "deploy" / "node.example.toml"
MANIFEST = """
schema = 1
name = "ct_lung"
version = "1.0.0"
title = "Lungs"
manufacturer = "m"
licence = "MIT"
intended_use = "tests"
runtime = "algorithm"
[inputs.image]
modality = ["CT"]
[outputs.maps.nodule]
label = "Nodule"
"""
PEER = """
[peer.PACS]
ae_title = "ORTHANC"
host = "127.0.0.1"
port = 4242
"""
ROUTE = """
[[route]]
name = "chest"
when = { Modality = "CT" }
run = "ct_lung"
send_to = "PACS"
"""


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "models" / "ct_lung"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(MANIFEST)
    return tmp_path


def read(text: str, base: Path) -> Settings:
    if "[node]" not in text:
        text = '[node]\nmodels = "models"\n' + text
    return parse(text, base=base)


def mistake(text: str, base: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        read(text, base)
    return str(caught.value)


def test_no_file_at_all_is_a_node_with_defaults(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    settings = load()

    assert settings.node.ae_title == "DICOM_NODE"
    assert settings.completion.settle == 2.0
    assert settings.completion.quiet == 20.0
    assert settings.ledger_url == f"sqlite:///{tmp_path}/dicom-node-data/ledger.sqlite3"


def test_what_a_peer_gets_is_its_wish(base):
    peer = read(PEER + 'results = ["sc", "seg"]\nsegmentation_type = "LABELMAP"\nsplit_segmentations_above = 400', base)
    plain = read(PEER, base)

    assert peer.peer["PACS"].wish == Wish(("sc", "seg"), "LABELMAP", 400)
    assert plain.peer["PACS"].wish == Wish(("seg", "sr"))


def test_a_route_reads_like_its_sentence(base):
    settings = read(PEER + ROUTE, base)

    route = settings.routes[0]
    assert (route.name, route.run, route.send_to) == ("chest", ("ct_lung",), ("PACS",))
    assert route.when == {"Modality": "CT"}


def test_a_route_without_a_name_is_called_by_its_number(base):
    assert read(PEER + ROUTE.replace('name = "chest"', ""), base).routes[0].name == "route 1"


def test_relative_folders_are_relative_to_the_file(base, monkeypatch):
    (base / "node.toml").write_text('[node]\nstorage = "data"\nmodels = "models"\n')
    monkeypatch.chdir("/")

    settings = load(base / "node.toml")

    assert settings.node.storage == base / "data"
    assert list(settings.catalogue()) == ["ct_lung"]


def test_settings_are_frozen(base):
    with pytest.raises(ValidationError):
        read("", base).node.port = 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[nod]\nport = 1", 'nod: no such key (did you mean "node"?)'),
        ("[node]\nprot = 1", 'node.prot: no such key (did you mean "port"?)'),
        ('[peer.P]\nae_title = "X"\nhost = "h"\nprot = 104', 'peer.P.prot: no such key (did you mean "port"?)'),
        ('[peer.P]\nae_title = "X"\nhost = "h"', "peer.P.port: Field required"),
        ('[[route]]\nrum = "x"\nsend_to = "P"', 'route[0].rum: no such key (did you mean "run"?)'),
        ("[completion]\nsetle = 1", 'completion.setle: no such key (did you mean "settle"?)'),
        ("[completion]\nsettle = -1", "completion.settle: Input should be greater than or equal to 0"),
        ('[node]\nport = "x"', "node.port: Input should be a valid integer"),
        ("[node]\nport = 70000", "node.port: Input should be less than or equal to 65535"),
        ('[node]\nae_title = "LONGER THAN SIXTEEN"', "node.ae_title: 'LONGER THAN SIXTEEN' is not an AE title"),
        ('[node]\nae_title = ""', "node.ae_title: '' is not an AE title"),
        ("[node]\nae_title = 'A\\B'", "is not an AE title"),
        ('[node]\ndevice = "gpu"', "node.device: 'gpu' is not a device"),
        ("completion = 3\n[node]", "completion: must be a table, written [completion]"),
        ('[receive]\ncalling_ae_titles = ["OK", ""]', "receive.calling_ae_titles[1]"),
        ("[receive]\nmaximum_associations = 0", "receive.maximum_associations"),
        ('[labelling]\nqualification = "RESEACH"', '(did you mean "RESEARCH"?)'),
        ('[peer.P]\nae_title = "X"\nhost = "h"\nport = 1\nresults = ["segg"]', "peer.P.results: no result kind 'segg'"),
        (PEER + 'segmentation_type = "LABEL"', "peer.PACS.segmentation_type: 'LABEL' is not one of the words"),
        (PEER + "split_segmentations_above = -1", "peer.PACS.split_segmentations_above"),
        ('[peer."a b"]\nae_title = "X"\nhost = "h"\nport = 104', "peer.a b: 'a b' is not a name"),
        ("[[route]]\nrun = []\nsend_to = []", "route[0].run"),
        ('[[route]]\nrun = 3\nsend_to = "P"', "route[0].run: Input should be a valid tuple"),
        (
            '[[route]]\nrun = "ct_lung"\nsend_to = "P"\nwhen = { Modalty = "CT" }',
            'route[0].when: \'Modalty\' is no DICOM keyword (did you mean "Modality"?)',
        ),
        (
            '[[route]]\nrun = "ct_lung"\nsend_to = "P"\nwhen = { Modality = "(" }',
            "route[0].when: Modality: '(' is no regular expression",
        ),
        ('[[route]]\nrun = "ct_lung"\nsend_to = "P"\nwhen = { KVP = 3 }', "route[0].when.KVP: Input should be"),
        (PEER + ROUTE.replace("ct_lung", "ct_lnug"), 'route[0].run: no model "ct_lnug"'),
        (PEER + ROUTE.replace("ct_lung", "ct_lnug"), '(did you mean "ct_lung"?)'),
        (PEER + ROUTE.replace('"PACS"', '"PASC"'), 'route[0].send_to: no [peer.PASC] (did you mean "PACS"?)'),
        (ROUTE, "route[0].send_to: no [peer.PACS] (there is none)"),
        ("[node\n", "node.toml: not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_key_and_the_nearest_word(base, text, expected):
    assert expected in mistake(text, base)


def test_every_mistake_is_named_at_once_each_on_its_line(base):
    lines = mistake('[node]\nprot = 1\n[completion]\nsetle = 1\n[peer.P]\nae_title = "X"', base).splitlines()

    assert [line.split(": ")[1] for line in lines] == [
        "node.prot",
        "completion.setle",
        "peer.P.host",
        "peer.P.port",
    ]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["absent", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "node.toml"
    if content:
        path.write_bytes(content)

    with pytest.raises(SettingsError, match=r"node\.toml: "):
        load(path)


def test_a_wrong_manifest_is_a_mistake_in_the_settings_that_names_file_and_key(base):
    (base / "models" / "ct_lung" / "model.toml").write_text(MANIFEST.replace('version = "1.0.0"', 'version = "v 1"'))

    assert "ct_lung/model.toml: version" in mistake(PEER + ROUTE, base)


def test_admission_carries_what_receive_says(base):
    settings = read(
        '[receive]\ncheck_called_ae_title = true\ncalling_ae_titles = ["CT1"]\nmaximum_associations_per_peer = 3', base
    )

    admission = settings.admission

    assert admission.calling_ae_titles == {"CT1"}
    assert admission.check_called_ae_title
    assert admission.maximum_associations_per_peer == 3
    assert {field.name for field in fields(Admission)} == set(Admission.__slots__)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="deploy/node.example.toml is not in this tree")
def test_the_example_names_every_key_that_there_is():
    text = EXAMPLE.read_text(encoding="utf-8")

    for name, field in Settings.model_fields.items():
        table = getattr(field.annotation, "model_fields", None)
        for key in table or ():
            assert key in text, f"[{name}] {key} is not in {EXAMPLE.name}"
