"""What the tests of results share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.conformance.cases import Case, make_case


@pytest.fixture(scope="session")
def case_of(tmp_path_factory) -> Callable[..., Case]:
    """Return a function that makes a case as `make_case` does, once; whoever changes it makes one of its own."""

    @functools.cache
    def made(geometry: str, **options: bool) -> Case:
        return make_case(tmp_path_factory.mktemp(geometry), geometry, **options)

    def case_of(geometry: str = "axial", **options: bool) -> Case:
        return made(geometry, **options)

    return case_of
