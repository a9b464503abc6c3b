"""What the documents say is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.config import Settings, load

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


def modules(package: str) -> list[str]:
    """Modules and sub-packages that stand directly in a package."""
    folder = ROOT / package
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(files | folders)


@pytest.mark.parametrize("name", modules("dicom_node"))
def test_every_module_of_the_node_is_in_the_architecture(name):
    assert re.search(rf"`{name}/?`", ARCHITECTURE)


@pytest.mark.parametrize("name", modules("workers"))
def test_every_module_of_the_workers_is_in_the_architecture(name):
    assert f"`workers.{name}`" in ARCHITECTURE


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:dicom_node|workers)/[\w/]+\.py)`", ARCHITECTURE))))
def test_every_file_that_the_architecture_names_exists(path):
    assert (ROOT / path).is_file()


def test_the_example_settings_are_the_defaults_and_name_every_key():
    text = (ROOT / "deploy" / "node.example.toml").read_text(encoding="utf-8")
    example, defaults = load(ROOT / "deploy" / "node.example.toml"), Settings()

    for table in ("receive", "completion", "jobs", "delivery", "tls", "web", "commitment", "retention", "labelling"):
        assert getattr(example, table) == getattr(defaults, table)
        for key in type(getattr(defaults, table)).model_fields:
            assert re.search(rf"^(# )?{key} = ", text, re.MULTILINE), key
    for key in type(defaults.node).model_fields:
        assert re.search(rf"^(# )?{key} = ", text, re.MULTILINE), key


@pytest.mark.parametrize("command", sorted(set(re.findall(r"dicom-node ([a-z-]+)", (ROOT / "README.md").read_text()))))
def test_every_command_of_the_readme_has_a_help_page(command):
    answer = CliRunner().invoke(app, [command, "--help"])

    assert answer.exit_code == 0


def test_every_link_of_the_documents_leads_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "models").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
