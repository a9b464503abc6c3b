"""What is free goes back to the system."""

from __future__ import annotations

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
