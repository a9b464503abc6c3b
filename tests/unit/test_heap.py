"""What is free goes back to the system, tensors lie in large pages, and the collector rests where it is told to."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from dicom_node import heap

_CHILD = """
from dicom_node import heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

heap.keep_small()
before = resident()
many = [bytes([1]) * 100_000 for _ in range(2000)]
last = bytes([1]) * 100_000  # the end of the heap is in use: nothing goes back by itself
del many
kept = resident() - before
heap.trim()
print(kept, resident() - before)
"""


@pytest.mark.skipif(heap._glibc() is None, reason="another C library than glibc")
def test_what_is_free_goes_back():
    ran = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True)
    kept, left = map(int, ran.stdout.split())

    assert kept > 100e6, "it went back by itself: nothing is tested"
    assert left < 0.2 * kept


WISHES = """
from dicom_node import heap
heap.use_large_pages()
import torch
kept = torch.ones(1 << 24)
flags = [line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags")]
print(sum("hg" in line for line in flags), len(flags))
"""


@pytest.mark.parametrize(("said", "wished"), [(None, True), ("0", False)])
def test_torch_asks_for_large_pages_unless_the_operator_has_said_otherwise(said, wished):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if said is None else {"THP_MEM_ALLOC_ENABLE": said}

    done = subprocess.run([sys.executable, "-c", WISHES], capture_output=True, text=True, env=environment, check=True)

    wishes, areas = map(int, done.stdout.split())
    if not areas:
        pytest.skip("this kernel does not say what its memory was asked for")
    assert (wishes > 0) == wished


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_rests_while_libraries_are_imported_and_is_as_it_was_afterwards(was_enabled):
    (gc.enable if was_enabled else gc.disable)()
    try:
        with heap.at_rest():
            meanwhile = gc.isenabled()
        afterwards = gc.isenabled()
    finally:
        gc.enable()

    assert (meanwhile, afterwards) == (False, was_enabled)
