"""The heap: few arenas, large pages, what is free goes back to the system, and the collector leaves alone what stays.

glibc gives threads arenas of their own, eight for each processor, and keeps in each what was freed. A node that starts
thousands of threads a day would grow for weeks, although nothing in it does.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_M_ARENA_MAX = -8  # malloc.h of glibc
_ARENAS = 2
_THRESHOLDS = 5000, 20, 20  # of the collector; CPython's own 700, 10, 10 had it walk a few objects 100 times a second


def keep_small() -> None:
    """Have few arenas from now on; call it before there are threads. Another C library than glibc is left as it is."""
    if (library := _glibc()) is not None:
        library.mallopt(_M_ARENA_MAX, _ARENAS)


def use_large_pages() -> None:
    """Have torch ask for large pages, unless the operator has said otherwise; call it before there is a tensor.

    A network makes and drops hundreds of megabytes for each of its layers, and the kernel clears every page of them.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def trim() -> None:
    """Give back what is free."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@contextmanager
def at_rest() -> Iterator[None]:
    """Have the collector rest meanwhile: what a library makes while it is imported stays, however often one looks."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def settle() -> None:
    """Have the collector leave alone what there is now: modules and what was made of the settings stay till the end.

    It would else walk through all of that, some 160,000 objects, whenever enough of a study's were made.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


@cache
def _glibc() -> Any:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None
