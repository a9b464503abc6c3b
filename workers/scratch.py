"""The folder of a contained model: made, held, measured, emptied, removed; whoever was killed leaves none for long."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger()

_PREFIX = "dicom-node-model-"
_FRESH = 60.0  # seconds in which a folder may not be locked yet by who made it
_MOST_FILES = 10_000


def hold() -> tuple[Path, int]:
    """Make a folder, and return it with the descriptor whose lock says that somebody needs it."""
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX)).resolve()
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def sweep() -> None:
    """Remove what workers that were killed left behind: folders of contained models that nobody holds."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _FRESH:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
        except OSError:
            continue
        finally:
            os.close(descriptor)


def written(folder: Path) -> int:
    """Return the bytes of all files below a folder; more files than there is a reason for count as endless."""
    total, seen, folders = 0, 0, [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    seen += 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue
        except OSError:
            return 1 << 62
        if seen > _MOST_FILES:
            return 1 << 62
    return total


def empty(folder: Path) -> None:
    """Delete the arrays in a folder."""
    for path in folder.rglob("*.npy"):
        with suppress(OSError):
            path.unlink()


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it, however deep."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:  # folders in folders in folders
        log.warning("model.scratch_left", folder=str(folder))
