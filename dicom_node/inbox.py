"""`arrived/`: whatever has been acknowledged and is not yet in the ledger, one file each.

Files get their names before there is anything to put into them, many at once: empty slots, whose names are made
durable by one sync of the folder. What is received is written to a slot, then its head, without which it is nothing
that anybody reads; then one sync of the file, and it may be acknowledged. What a crash left half-received has no head,
and what a power cut has torn says so itself: its digest is not that of its data set. Neither was acknowledged.

Each further process that receives has a folder of its own in it, `arrived/1/` and so on, which is locked while it runs.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dicom_node import native
from dicom_node.disk import availability, sync_folder
from dicom_node.errors import SettingsError
from dicom_node.landing import Landing, memory
from dicom_node.part10 import has_head

_ARRIVED = "arrived"
_SLOTS = 64  # made at once
_FEW = 32  # below which more are made
_RESERVED = 8  # for those who begin: whoever is in the middle of a series does with fewer at a time
_MODE = 0o640
_SLOT, _EARLIER = ".slot", ".dcm"  # earlier versions named a file when it was whole
_LOOK_AGAIN = 0.02  # seconds between two looks at what other processes do
_LONG = 60.0  # seconds after which nobody waits for what another process has not recorded


class Slot(NamedTuple):
    """A file that holds nothing yet, and is open."""

    path: str
    descriptor: int


class Inbox:
    """The folder of what waits for the ledger."""

    def __init__(self, storage: Path, *, part: int = 0, parts: int = 1) -> None:
        """Use the folder `arrived` in `storage`, or its part with a number; make it where it is missing.

        `parts` is how many processes receive, each into its own; who has the whole takes up what lies in any beyond.
        """
        self._root = storage / _ARRIVED
        self._is_part = part > 0
        self._parts = parts
        self._held: int | None = None  # keeps other processes out
        self.folder = self._root / str(part) if part else self._root
        with availability():
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            sync_folder(storage)
        self._slots: list[Slot] = []  # the same list throughout
        weakref.finalize(self, _close, self._slots)  # whoever forgets to close leaves slots to be swept, but none open
        self._lock = threading.Lock()
        self._maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="slots")
        self._is_making = self._is_closed = False

    def own(self, *, patience: float = 10.0) -> None:
        """Wait until no process of an earlier life receives any more; a part of the inbox is this process's then.

        Raises SettingsError where one is still there after `patience` seconds.
        """
        until = time.monotonic() + patience
        with availability():
            for folder in [self.folder] if self._is_part else parts_of(self._root):
                descriptor = _locked(folder, until)
                if self._is_part:
                    self._held = descriptor
                else:
                    os.close(descriptor)

    def open(self, *, lead: int, room: memoryview | None = None) -> Arriving:
        """Return a file to write to, from `lead` on, out of `room`; raise Unavailable where there can be none."""
        with availability():
            slot = self._slot()
            while not native.has_name(slot.descriptor):  # somebody has tidied up
                os.close(slot.descriptor)
                slot = self._slot()
            return Arriving(slot, lead, room)

    def spare(self, number: int) -> list[Slot]:
        """Return so many slots, or fewer: those that nobody has to wait for."""
        with self._lock:
            kept = len(self._slots) - max(0, min(number, len(self._slots) - _RESERVED))
            slots = self._slots[kept:]
            del self._slots[kept:]
            return slots

    def give_back(self, slots: list[Slot], *, is_written: bool = False) -> None:
        """Let others have slots that were not needed; to the first something may have been written: it is no slot."""
        with self._lock:
            unused = [] if self._is_closed else slots[is_written:]
            self._slots += unused
        _discard(slots[: len(slots) - len(unused)])

    def _slot(self) -> Slot:
        """Return a slot, and have others made before there are none: whoever receives need not wait for them."""
        with self._lock:
            if not self._slots:
                self._slots += self._made()
            slot = self._slots.pop()
            if len(self._slots) < _FEW and not self._is_making:
                self._is_making = True
                with suppress(RuntimeError):  # it is being closed
                    self._maker.submit(self._make)
            return slot

    def _make(self) -> None:
        made: list[Slot] = []
        with suppress(OSError):  # who finds none makes some, and says what is wrong
            made = self._made()
        with self._lock:
            self._slots += made
            self._is_making = False

    def _made(self) -> list[Slot]:
        chance = os.urandom(16 * _SLOTS).hex()
        paths = [f"{self.folder}/{chance[at : at + 32]}{_SLOT}" for at in range(0, len(chance), 32)]
        made = [Slot(path, descriptor) for path, descriptor in zip(paths, native.create(paths, _MODE), strict=False)]
        try:
            for path in paths[len(made) :]:
                made.append(Slot(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)))
            sync_folder(self.folder)
        except BaseException:
            _discard(made)
            raise
        return made

    def close(self) -> None:
        """Delete the slots that were not needed; after it there are no more."""
        self._maker.shutdown()
        with self._lock:
            self._is_closed = True
            _discard(self._slots)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def waiting(self) -> list[Path]:
        """Return what was acknowledged and has not been recorded, the oldest first."""
        found = [(written_at, path) for path, written_at, is_whole in self._files() if is_whole]
        return [path for _, path in sorted(found)]

    def unfinished(self) -> list[Path]:
        """Return what has no head: slots, and what is being received now or was when an earlier life ended."""
        return [path for path, _, is_whole in self._files() if not is_whole]

    def taken_up(self) -> list[int]:
        """Return the numbers of the parts that no process has any more: whoever has the whole takes them up."""
        there = [] if self._is_part else [int(each.name) for each in parts_of(self._root)]
        return [part for part in there if part >= self._parts]

    def wait_for_others(self, *, timeout: float) -> bool:
        """Wait until what other processes have acknowledged by now is recorded; return whether it is.

        What has lain there for long is not waited for: it cannot be recorded, or a ledger that is away says so itself.
        """
        until, since = time.monotonic() + timeout, (time.time() - _LONG) * 1e9
        others = [each for each in [self._root, *parts_of(self._root)] if each != self.folder]
        waiting = [path for path, written_at, is_whole in _files(others) if is_whole and written_at > since]
        while waiting and time.monotonic() < until:
            time.sleep(_LOOK_AGAIN)
            waiting = [path for path in waiting if path.exists()]
        return not waiting

    def _files(self) -> list[tuple[Path, int, bool]]:
        return _files([self.folder, *(self._root / str(part) for part in self.taken_up())])


def parts_of(folder: Path) -> list[Path]:
    """Return the folders of further processes that receive, or once did."""
    return sorted((each for each in folder.iterdir() if each.name.isdigit()), key=lambda each: int(each.name))


def _files(folders: Iterable[Path]) -> list[tuple[Path, int, bool]]:
    """Return every file, when it was written last in nanoseconds, and whether it has its head."""
    found = []
    with availability():
        for folder in folders:
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    if entry.is_file():
                        is_whole = entry.name.endswith(_EARLIER) or _is_written(entry)
                        found.append((Path(entry.path), entry.stat().st_mtime_ns, is_whole))
    return found


def _locked(folder: Path, until: float) -> int:
    """Lock a folder, and return the descriptor that keeps it so; raise SettingsError where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError as error:
            if time.monotonic() > until:
                os.close(descriptor)
                raise SettingsError(
                    f"node.storage: a process of an earlier life still receives into {folder}"
                ) from error
        time.sleep(_LOOK_AGAIN)


def _is_written(entry: os.DirEntry[str]) -> bool:
    if not entry.stat().st_size:
        return False
    with open(entry.path, "rb") as file:
        return has_head(file)


def _discard(slots: list[Slot]) -> None:
    for slot in slots:
        _delete(slot.path)
    _close(slots)


def _close(slots: list[Slot]) -> None:
    while slots:
        os.close(slots.pop().descriptor)


def _delete(path: str) -> None:
    """Delete what holds nothing; what a broken disk keeps, the next start sweeps away."""
    with suppress(OSError):
        os.unlink(path)


class Arriving(Landing):
    """One file while it is being received: no trace if anything fails, which is Unavailable then."""

    def __init__(self, slot: Slot, lead: int, room: memoryview | None) -> None:
        """Write to `slot`, from `lead` on, out of `room`, or memory of its own where there is none."""
        super().__init__(slot.descriptor, memory() if room is None else room, lead=lead)
        self.path = slot.path
        self._is_kept = False

    def took(self, number: int) -> None:
        """Note that so many bytes have come into the room; raise Unavailable where the disk does not take them."""
        with availability():
            super().took(number)

    def whole(self) -> memoryview:
        """Return the bytes that are there, after as many as the head will have."""
        with availability():
            return super().whole()

    def landed(self) -> None:
        """Note that C has kept it."""
        self._is_kept = True
        super().landed()

    def keep(self, lead: bytes, reply: native.Reply | None = None) -> None:
        """Write what room was left for; on return all of it is on stable storage, and found by `path`."""
        with availability():
            super().keep(lead, reply)
        self._is_kept = True

    def close(self) -> None:
        """Let go of it; what was not kept is gone."""
        super().close()
        if not self._is_kept:
            _delete(self.path)
