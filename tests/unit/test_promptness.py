"""What is done for every instance in a few microseconds keeps the interpreter's lock: to have it again takes longer."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from dicom_node import native
from dicom_node.digest import digesting, feed
from dicom_node.elements import scan
from tests.datasets import EXPLICIT, ct, encoded

SLICE = memoryview(bytes(525_000))
DATA = memoryview(encoded(ct(), EXPLICIT))


@pytest.fixture
def neighbour():
    """Run a thread that counts whenever it is let in, and is let in only by who lets go of the lock."""
    counted, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    yield counted
    sys.setswitchinterval(before)
    stop.set()
    thread.join()


STEPS = {
    "the digest of a slice": lambda: feed(digesting(), SLICE),
    "the scan of a data set": lambda: scan(DATA, False, frozenset([0x00080016, 0x0020000E])),
}


def let_in(neighbour: list[int], step, times: int = 300) -> int:
    before = neighbour[0]
    for _ in range(times):
        step()
    return neighbour[0] - before


@pytest.mark.skipif(not native.is_there, reason="installed without a C compiler")
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_nobody_is_let_in(neighbour, step):
    assert let_in(neighbour, step) == 0


@pytest.mark.skipif(not native.is_there, reason="installed without a C compiler")
def test_nobody_is_let_in_to_see_whether_a_file_has_a_name(neighbour):
    descriptor = os.open(__file__, os.O_RDONLY)
    try:
        assert let_in(neighbour, lambda: native.has_name(descriptor)) == 0
    finally:
        os.close(descriptor)


def test_somebody_is_let_in_where_the_lock_is_given_up(neighbour):
    deadline = time.monotonic() + 30
    while not let_in(neighbour, lambda: digesting().update(SLICE)):
        assert time.monotonic() < deadline


def test_a_file_that_was_deleted_has_no_name(tmp_path):
    path = tmp_path / "file"
    with path.open("w") as file:
        assert native.has_name(file.fileno())
        path.unlink()
        assert not native.has_name(file.fileno())
