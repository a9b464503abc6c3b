"""The conformance statement is the code's."""

from __future__ import annotations

from pathlib import Path

from dicom_node.conformance import statement

ROOT = Path(__file__).resolve().parents[2]


def test_the_conformance_statement_is_not_stale():
    assert (ROOT / "CONFORMANCE.md").read_text(encoding="utf-8") == statement(), (
        "run: dicom-node export-conformance > CONFORMANCE.md"
    )
