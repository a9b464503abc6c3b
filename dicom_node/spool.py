"""Bytes on disk: a temporary file, fsync, a name that was free, fsync of the folder. Nothing is ever overwritten."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dicom_node.entities import Header
from dicom_node.errors import SettingsError, SpoolFull, Unavailable
from dicom_node.watermark import Watermark

_REMEMBERED = 10_000  # folders known to exist
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
Bytes = bytes | memoryview
_META_HEAD = 144  # bytes of preamble, prefix and the element that says how long the meta information is
_META_LENGTH = b"DICM" + b"\x02\x00\x00\x00UL\x04\x00"
_PIECE = 1 << 20


class Spool:
    """The storage folder: `studies/` as received, `results/` as encoded, `quarantine/`, and `incoming/` in between."""

    def __init__(self, storage: Path, *, minimum_free: int = 0) -> None:
        """Use the folder `storage`; refuse to write below `minimum_free` bytes of free space."""
        self.storage = storage
        self._watermark = Watermark(storage, minimum_free)
        self._incoming = storage / "incoming"
        self._known: set[Path] = set()
        self._lock: int | None = None
        with _availability():
            self._make(self._incoming)

    def own(self) -> None:
        """Take the folder for this process until it ends; raise SettingsError where another node has it.

        A second node on the same folder would sweep away what the first is writing and end its broker.
        """
        with _availability():
            descriptor = os.open(self.storage / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise SettingsError(f"node.storage: another node runs on {self.storage}") from error
        self._lock = descriptor

    def disown(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def absolute(self, path: str) -> Path:
        """Return where a path that the ledger holds lies."""
        return self.storage / path

    def require_room(self, size: int = 0) -> None:
        """Raise SpoolFull where free space is below the watermark, or `size` more bytes would bring it there."""
        with _availability():
            self._watermark.require_room(size)

    def watch_room(self, note: Callable[[str, int], None]) -> None:
        """Have `note` write down that the door for what arrives has been shut or opened: the event, free bytes."""
        with _availability():
            self._watermark.tell(note)

    def keep(self, header: Header, preamble: bytes, dataset: Bytes) -> str:
        """Write one instance as received and return its path; on return it is on stable storage.

        The ledger does not know the instance yet, so a file of that name can only be what a crash left
        behind before it was acknowledged: it is replaced.
        """
        path = Path("studies", header.study_instance_uid, header.series_instance_uid, f"{header.sop_instance_uid}.dcm")
        self._write(path, preamble, dataset, room=True)
        return str(path)

    def quarantine(self, header: Header, sha256: str, preamble: bytes, dataset: Bytes) -> str:
        """Write an instance whose UID is taken by other bytes; return its path."""
        path = Path("quarantine", f"{header.sop_instance_uid}.{sha256[:16]}.dcm")
        self._write(path, preamble, dataset, room=True)
        return str(path)

    def keep_result(self, sop_instance_uid: str, content: Bytes) -> tuple[str, str]:
        """Write an encoded result object; return its path and the SHA-256 (hex) of the file.

        The digest is part of the name: a worker that lost its lease and still writes the same object, with
        other times in it, must not change the bytes that the ledger knows and that a peer may hold already.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        path = Path("results", sop_instance_uid[-2:], f"{sop_instance_uid}.{sha256[:16]}.dcm")
        self._write(path, b"", content, room=False)
        return str(path), sha256

    def forget_other_results(self, sop_instance_uid: str, path: str) -> None:
        """Delete the files that other attempts wrote for the result whose one file is `path`."""
        kept = self.absolute(path)
        for other in kept.parent.glob(f"{sop_instance_uid}.*.dcm"):
            if other != kept:
                other.unlink(missing_ok=True)

    def is_intact(self, path: str, *, dataset_sha256: str) -> bool:
        """Return whether a received file is there and its data set is the one with this digest; reads all of it."""
        try:
            with self.absolute(path).open("rb") as file:
                return dataset_digest(file) == dataset_sha256
        except (OSError, ValueError):
            return False

    def forget_folders(self) -> None:
        """Forget which folders are there: some have been moved away."""
        self._known.clear()

    def sweep_incoming(self) -> int:
        """Delete temporary files that an earlier life of the node left; return how many."""
        with _availability():
            leftovers = list(self._incoming.iterdir())
            for path in leftovers:
                path.unlink(missing_ok=True)
        return len(leftovers)

    def _write(self, path: Path, preamble: bytes, content: Bytes, *, room: bool) -> None:
        if room:
            self.require_room(len(content))
        temporary = self._incoming / uuid.uuid4().hex
        with _availability():
            try:
                self._make(self._incoming)
                with temporary.open("xb", buffering=0) as file:
                    _write_all(file.fileno(), preamble)
                    _write_all(file.fileno(), content)
                    os.fsync(file.fileno())
                target = self.storage / path
                self._make(target.parent)
                os.replace(temporary, target)
                _fsync_folder(target.parent)
            except BaseException:
                self._known.clear()  # somebody may have deleted a folder that we remember
                temporary.unlink(missing_ok=True)
                raise

    def _make(self, folder: Path) -> None:
        """Make a folder and its parents, each durable in its own parent.

        One that exists is synced as well the first time: another thread may have made it this very moment.
        """
        if folder in self._known:
            return
        if not folder.is_dir():
            self._make(folder.parent)
            folder.mkdir(exist_ok=True)
        if folder != self.storage and folder.is_relative_to(self.storage):
            _fsync_folder(folder.parent)
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known.add(folder)


def dataset_digest(file: BinaryIO) -> str:
    """Return the SHA-256 (hex) of the data set of a Part 10 file, read in pieces (PS3.10 Section 7.1).

    Raises ValueError where the file has no meta information of a known length, which every file of the node has.
    """
    head = file.read(_META_HEAD)
    if len(head) < _META_HEAD or head[128:140] != _META_LENGTH:
        raise ValueError("no file meta information")
    file.seek(_META_HEAD + int.from_bytes(head[140:144], "little"))
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _write_all(descriptor: int, content: Bytes) -> None:
    """Write every byte; one write may take only a part (2 GiB at most, less where the disk is nearly full)."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _availability() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise SpoolFull("Out of resources: the disk is full") from error
        raise Unavailable(f"The storage folder cannot be written: {error.strerror}") from error
