"""What all tests share: real peers that may be missing, and real data that may be absent."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from dicom_node import heap, native, turns
from dicom_node.niceness import wait_asleep

turns.amend()  # senders of the tests lose no answer either
heap.use_large_pages()  # models run here as they do in a worker
wait_asleep()

_configure = structlog.configure


def _configure_anew(**options: Any) -> None:
    """Configure as the node does, but keep no logger: `capture_logs` would not hear it in a later test."""
    _configure(**options | {"cache_logger_on_first_use": False})


structlog.configure = _configure_anew

ROOT = Path(__file__).resolve().parents[1]
_SYSTEM = "/usr/sbin:/usr/bin:/usr/local/bin"  # before the environment: pynetdicom installs a storescu of its own
_ENVIRONMENT = str(Path(sys.executable).parent)


def find_tool(name: str) -> str | None:
    """Return the executable of a real peer or validator, the system's before the environment's."""
    return shutil.which(name, path=f"{_SYSTEM}:{_ENVIRONMENT}:{os.environ.get('PATH', '')}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose peer is missing; where CI is set, a missing peer is a failure, so that none goes unnoticed."""
    for marker in item.iter_markers("peer"):
        (name,) = marker.args
        if find_tool(name) is None:
            message = f"{name} is not installed (see .ci/run for the packages)"
            if os.environ.get("CI"):
                pytest.fail(message)
            pytest.skip(message)


@pytest.fixture(scope="session")
def descriptors() -> Callable[[Path], list[str]]:
    """Return a function that lists what this process has open in or below a folder, garbage aside."""

    def open_below(folder: Path) -> list[str]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of what other tests have left
            gc.collect()
        links = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # that of this look itself, or another thread's
                links.append(os.readlink(entry))
        return sorted(link for link in links if link.startswith(str(folder)))

    return open_below


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """Return a function from a tool's name to its path; the test must bear the marker `peer`."""

    def path(name: str) -> str:
        found = find_tool(name)
        assert found is not None, f"{name} is not installed: mark the test with peer({name!r})"
        return found

    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real studies beside the checkout; skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real studies beside the checkout (../shared/data)")
    return folder


@pytest.fixture
def in_python(monkeypatch):
    """Have nothing done in C: what is patched in Python is what runs."""
    monkeypatch.setattr(native, "_library", None)


@pytest.fixture(params=["in C", "in Python"], scope="module")
def either_way(request):
    """Once in C, once in Python: what the one does, the other does as well, byte for byte."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in Python":
            patch.setattr(native, "_library", None)
        elif not native.is_there:
            (pytest.fail if os.environ.get("CI") else pytest.skip)("installed without a C compiler")
        yield request.param
