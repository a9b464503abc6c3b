"""Audit messages that the collector has not read yet: a file each, durable, in one order for all processes."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dicom_node.errors import SpoolFull, Unavailable

_UNFINISHED = ".unfinished"
_COUNT_AGAIN, _COUNTING = 1.0, 50  # seconds until the bytes are counted again, and at least so many times as it takes
_DIGITS = 20  # of a file's number: nanoseconds since 1970, or one more than the last


class Outbox:
    """The folder `audit/` of the storage folder; its files and it are their owner's alone."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        """Use `folder`, made with the first message, for `limit` bytes at most."""
        self._folder = folder
        self._limit = limit
        self._highest: int | None = None  # number when this process came
        self._size = 0
        self._counted_until = 0.0

    def put(self, message: bytes, *, beyond_limit: bool = False) -> None:
        """Keep a message; on return it is on stable storage, after every message that was put before.

        Raises:
            SpoolFull: the limit is reached, or the disk is full; nothing that is kept makes room.
            Unavailable: the folder cannot be written.
        """
        with _availability(), self._locked() as lock:
            if not (beyond_limit or self.has_room(len(message))):
                raise SpoolFull(f"audit.spool_megabytes: {self._limit >> 20} MB of audit messages wait already")
            if self._highest is None:
                self._highest = max(map(int, self._names()), default=0)
            number = max(time.time_ns(), _read_number(lock) + 1, self._highest + 1)
            os.pwrite(lock, b"%0*d" % (_DIGITS, number), 0)
            self._write(self._folder / f"{number:0{_DIGITS}d}", message)
            self._size += len(message)

    def has_room(self, size: int) -> bool:
        """Return whether a message of so many bytes would be kept."""
        with _availability():
            return self._counted() + size <= self._limit

    @property
    def is_roomy(self) -> bool:
        """Return whether a tenth of the limit is free: one that was full takes messages again only then."""
        return self.has_room(self._limit // 10)

    def waiting(self) -> list[Path]:
        """Return the files of the messages, in the order in which they were put; none is missing before the last."""
        with _availability():
            if not self._folder.is_dir():
                return []
            with self._locked():  # a listing that goes on while names are given may leave out one and have the next
                return [self._folder / name for name in sorted(self._names())]

    def size(self) -> int:
        """Return how many bytes wait."""
        total = 0
        for name in self._names():
            with suppress(FileNotFoundError):  # just sent
                total += os.stat(self._folder / name).st_size
        return total

    def remove(self, paths: Sequence[Path]) -> None:
        """Let go of messages; that a power cut may bring some of them back does no harm."""
        with _availability():
            for path in paths:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what processes that died have left unfinished."""
        with _availability(), self._locked():
            for path in self._folder.glob(f"*{_UNFINISHED}"):
                path.unlink(missing_ok=True)

    def _names(self) -> Iterator[str]:
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.isdigit():
                    yield entry.name

    def _counted(self) -> int:
        """Return how many bytes wait, or did a moment ago: with a hundred thousand files counting takes its time."""
        started = time.monotonic()
        if started > self._counted_until:
            self._size = self.size()
            took = time.monotonic() - started
            self._counted_until = started + max(_COUNT_AGAIN, _COUNTING * took)
        return self._size

    def _write(self, path: Path, message: bytes) -> None:
        unfinished = path.with_suffix(_UNFINISHED)
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(message)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            os.rename(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        _fsync(self._folder)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the folder against every other process and thread: a message is there before the next has a number."""
        if not self._folder.is_dir():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _fsync(self._folder.parent)
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _read_number(lock: int) -> int:
    """Return the last number given; after a power cut it may be lost, and the clock has gone on."""
    text = os.pread(lock, _DIGITS, 0)
    return int(text) if text.isdigit() else 0


def _fsync(folder: Path) -> None:
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
        raise Unavailable(f"The audit spool cannot be used: {error.strerror}") from error
