"""What the disk is asked for, everywhere the same: every byte, durable names, and an error that says again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from dicom_node.errors import SpoolFull, Unavailable

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
Bytes = bytes | bytearray | memoryview


class _Availability:
    """Turns what the operating system says of the storage folder into SpoolFull or Unavailable."""

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            if error.errno in _NO_ROOM:
                raise SpoolFull("Out of resources: the disk is full") from error
            raise Unavailable(f"The storage folder cannot be written: {error.strerror}") from error


_AVAILABILITY = _Availability()


def availability() -> _Availability:
    """Return a context in which an OSError becomes SpoolFull or Unavailable."""
    return _AVAILABILITY


def write_all(descriptor: int, content: Bytes) -> int:
    """Write every byte and return how many; one write may take only a part (2 GiB, less where the disk is full)."""
    written = os.write(descriptor, content)
    if written == len(content):
        return written
    view = memoryview(content)
    while written < len(view):
        written += os.write(descriptor, view[written:])
    return written


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
