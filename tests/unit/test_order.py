"""The order in which tests are run leaves none out."""

from __future__ import annotations

import tomllib
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_folder_of_tests_is_run():
    settings = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())

    listed = settings["tool"]["pytest"]["ini_options"]["testpaths"]

    assert sorted(listed) == sorted({f"tests/{path.parent.name}" for path in TESTS.glob("*/test_*.py")})
    assert not list(TESTS.glob("test_*.py")) + list(TESTS.glob("*/*/**/test_*.py"))
