"""The heap of the C library: few arenas, and what is free goes back to the system.

glibc gives threads arenas of their own, eight for each processor, and keeps in each what was freed. A node that starts
thousands of threads a day would grow for weeks, although nothing in it does.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_M_ARENA_MAX = -8  # malloc.h of glibc
_ARENAS = 2


def keep_small() -> None:
    """Have few arenas from now on; call it before there are threads. Another C library than glibc is left as it is."""
    if (library := _glibc()) is not None:
        library.mallopt(_M_ARENA_MAX, _ARENAS)


def trim() -> None:
    """Give back what is free."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None
