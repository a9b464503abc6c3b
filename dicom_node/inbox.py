"""`arrived/`: whatever has been acknowledged and is not yet in the ledger, one file each.

A file has no name while it is being received, so nothing half-received is ever left behind. It gets its name, then
file and folder are synced, then it may be acknowledged. What a power cut has torn was never acknowledged, and says so
itself: its digest is not that of its data set.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from dicom_node.disk import Bytes, availability, sync_folder, write_all

_ARRIVED = "arrived"
_UNNAMED = getattr(os, "O_TMPFILE", 0)
_NO_UNNAMED = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})
_MODE = 0o640
_NAMED, _UNFINISHED = ".dcm", ".part"


class Inbox:
    """The folder of what waits for the ledger."""

    def __init__(self, storage: Path) -> None:
        """Use the folder `arrived` in `storage`; make it where it is missing."""
        self.folder = storage / _ARRIVED
        with availability():
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(storage)
        self._descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self) -> Arriving:
        """Return a new file to write to."""
        with availability():
            return Arriving(self.folder, self._descriptor)

    def waiting(self) -> list[Path]:
        """Return what was acknowledged and has not been recorded, the oldest first."""
        with availability():
            found = [
                (entry.stat().st_mtime_ns, entry.name)
                for entry in os.scandir(self.folder)
                if entry.name.endswith(_NAMED)
            ]
        return [self.folder / name for _, name in sorted(found)]

    def unfinished(self) -> list[Path]:
        """Return what an earlier life left where files must have names."""
        return list(self.folder.glob(f"*{_UNFINISHED}"))


class Arriving:
    """One file while it is being received: no name, no trace if anything fails."""

    def __init__(self, folder: Path, folder_descriptor: int) -> None:
        self._folder = folder
        self._folder_descriptor = folder_descriptor
        self._temporary: Path | None = None
        self.size = 0
        self._descriptor = self._opened()

    def _opened(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open(self._folder, flags | _UNNAMED, _MODE)
        except OSError as error:
            if error.errno not in _NO_UNNAMED:
                raise
        # a file system without unnamed files, such as NFS: a name that the next start sweeps away
        self._temporary = self._folder / f"{os.urandom(16).hex()}{_UNFINISHED}"
        return os.open(self._temporary, flags | os.O_CREAT | os.O_EXCL, _MODE)

    def write(self, content: Bytes) -> None:
        """Append; raise Unavailable where the disk does not take it."""
        with availability():
            self.size += write_all(self._descriptor, content)

    def skip(self, length: int) -> None:
        """Leave room for so many bytes at the beginning."""
        os.lseek(self._descriptor, length, os.SEEK_SET)
        self.size = length

    def begin_with(self, content: Bytes) -> None:
        """Write what room was left for: without it, the file is nothing that anybody reads."""
        with availability():
            os.pwrite(self._descriptor, content, 0)

    def view(self) -> mmap.mmap:
        """Return the bytes that are there, without copying them."""
        with availability():
            return mmap.mmap(self._descriptor, self.size, prot=mmap.PROT_READ)

    def keep(self) -> Path:
        """Give the file its name and return it; on return file and name are on stable storage."""
        path = self._folder / f"{os.urandom(16).hex()}{_NAMED}"
        try:
            with availability():
                self._link(path)
                # the name first: one transaction of the file system then holds both, and one sync waits for it
                os.fsync(self._descriptor)
                os.fsync(self._folder_descriptor)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path

    def _link(self, path: Path) -> None:
        if self._temporary is not None:
            self._temporary.rename(path)
            self._temporary = None
        else:
            # the folder's descriptor makes Python call linkat, which follows /proc's link to the unnamed file
            os.link(f"/proc/self/fd/{self._descriptor}", path.name, dst_dir_fd=self._folder_descriptor)

    def close(self) -> None:
        """Let go of it; without a name it is gone."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
