"""Every file is read again and compared with the ledger, both ways, while the node runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from dicom_node.ledger import Ledger
from dicom_node.ledger.inventory import Item
from dicom_node.part10 import dataset_digest

_READERS = 4
_IN_FLIGHT = 64  # files that are being read or wait for a reader
_BATCH = 1000  # files that the ledger is asked about together
_OTHERS = 0o007  # permissions that nobody else has a need for
_SHORTENED = 16  # characters of a SHA-256: so earlier versions named what is in quarantine
_META_HEAD = 144  # bytes of preamble, prefix and the element that says how long the meta information is


class Fault(StrEnum):
    """What can be wrong with a file."""

    MISSING = "missing"
    ALTERED = "altered"
    UNREADABLE = "unreadable"
    UNKNOWN = "unknown"
    TEMPORARY = "temporary"
    EXPOSED = "exposed"


REMEDIES: dict[Fault, str] = {
    Fault.MISSING: "the ledger knows it and it is gone: restore it from a backup",
    Fault.ALTERED: "its bytes are not those that were kept: look after the disk, restore it from a backup; "
    "the node neither sends nor commits it",
    Fault.UNREADABLE: "look after the disk and the permissions: the node's own user must be able to read it",
    Fault.UNKNOWN: "no row of the ledger is about it, a crash may have left it before it was acknowledged: look, then "
    "delete it",
    Fault.TEMPORARY: "the next start of the node deletes it or finishes what it is of",
    Fault.EXPOSED: "users who have nothing to do with the node can read it: chmod o-rwx",
}

_LASTING = ("studies", "results")
_PASSING = ("incoming", "departing", "arrived")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; `path` is relative to the storage folder."""

    fault: Fault
    path: str
    study_instance_uid: str | None = None
    detail: str = ""


class Inspection:
    """One look at everything that is kept."""

    def __init__(
        self, ledger: Ledger, storage: Path, *, grace: float = 3600.0, clock: Callable[[], float] = time.time
    ) -> None:
        """Compare `ledger` with `storage`; a file younger than `grace` seconds may be on its way."""
        self._ledger = ledger
        self._storage = storage
        self._grace = grace
        self._clock = clock

    def problems(
        self, study_instance_uid: str | None = None, *, read: Callable[[], object] = lambda: None
    ) -> Iterator[Problem]:
        """Yield what is wrong, with one study or with all; `read` is called for each file that has been read.

        What arrives or is deleted meanwhile is no problem: the ledger is asked again before one is told.
        """
        yield from self._still_true(self._read_all(study_instance_uid, read))
        folders = [self._storage / each for each in _LASTING]
        if study_instance_uid is not None:
            folders = [self._storage / "studies" / study_instance_uid]
        yield from self._unknown(folders)
        if study_instance_uid is None:
            yield from self._passing()
            yield from self._quarantine()

    def unrecorded_results(self) -> Iterator[Path]:
        """Yield the result files older than the grace that no row is about: attempts wrote them in vain."""
        for problem in self._unknown([self._storage / "results"]):
            yield self._storage / problem.path

    # -- from the ledger to the files -----------------------------------------------------------------------

    def _read_all(self, study_instance_uid: str | None, read: Callable[[], object]) -> Iterator[tuple[Item, Problem]]:
        with ThreadPoolExecutor(_READERS, thread_name_prefix="inspection") as pool:
            waiting: deque[tuple[Item, Future[Problem | None]]] = deque()
            items = self._ledger.inventory.items(study_instance_uid)
            while True:
                for item in islice(items, _IN_FLIGHT - len(waiting)):
                    waiting.append((item, pool.submit(self._read, item)))
                if not waiting:
                    return
                item, future = waiting.popleft()
                problem = future.result()
                read()
                if problem is not None:
                    yield item, problem

    def _read(self, item: Item) -> Problem | None:
        about = item.path, item.study_instance_uid
        try:
            with (self._storage / item.path).open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                try:
                    digest = _file_digest(file) if item.is_result else _digest_as_received(file, item)
                except ValueError as error:
                    return Problem(Fault.ALTERED, *about, str(error))
                finally:
                    # what the receiver has just written is worth more in memory than what is read once
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except FileNotFoundError:
            return Problem(Fault.MISSING, *about)
        except OSError as error:
            return Problem(Fault.UNREADABLE, *about, error.strerror or "")
        if digest != item.digest:
            return Problem(Fault.ALTERED, *about, "not the digest of the ledger")
        return Problem(Fault.EXPOSED, *about, f"mode {mode & 0o777:03o}") if mode & _OTHERS else None

    def _still_true(self, found: Iterable[tuple[Item, Problem]]) -> Iterator[Problem]:
        """Leave out what is deleted by now, and what has come back."""
        for item, _ in found:
            if self._ledger.inventory.named([item.sop_instance_uid]).get(item.path) != item:
                continue
            again = self._read(item)
            if again is not None:
                yield again

    # -- from the files to the ledger -----------------------------------------------------------------------

    def _unknown(self, folders: Iterable[Path]) -> Iterator[Problem]:
        files = (path for folder in folders for path in _files(folder))
        suspects: list[Path] = []
        while batch := list(islice(files, _BATCH)):
            suspects += self._not_known(batch)
        for path in self._not_known(suspects):  # what was on its way then is known now
            if self._is_old(path):
                yield Problem(Fault.UNKNOWN, str(path.relative_to(self._storage)))

    def _not_known(self, paths: list[Path]) -> list[Path]:
        known = self._ledger.inventory.named(_sop_instance_uid(path) for path in paths)
        return [path for path in paths if str(path.relative_to(self._storage)) not in known]

    def _passing(self) -> Iterator[Problem]:
        for folder in _PASSING:
            for path in _files(self._storage / folder):
                if self._is_old(path) and not (folder == "arrived" and _is_empty(path)):  # a slot for what will arrive
                    yield Problem(Fault.TEMPORARY, str(path.relative_to(self._storage)))

    def _quarantine(self) -> Iterator[Problem]:
        """Compare what is set aside with the digest in its name."""
        for path in _files(self._storage / "quarantine"):
            where = str(path.relative_to(self._storage))
            named = _digest_in(path.name)
            try:
                with path.open("rb") as file:
                    digest = dataset_digest(file, named if len(named) > _SHORTENED else 4 * named)
            except FileNotFoundError:
                continue
            except ValueError as error:
                yield Problem(Fault.ALTERED, where, detail=str(error))
            except OSError as error:
                yield Problem(Fault.UNREADABLE, where, detail=error.strerror or "")
            else:
                if not digest.startswith(named):
                    yield Problem(Fault.ALTERED, where, detail="not the digest of its name")

    def _is_old(self, path: Path) -> bool:
        try:
            return self._clock() - path.lstat().st_mtime >= self._grace
        except FileNotFoundError:
            return False


def _is_empty(path: Path) -> bool:
    try:
        return not path.lstat().st_size
    except FileNotFoundError:
        return True


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder; what is deleted meanwhile is left out."""
    for where, _folders, names in os.walk(folder):
        for name in names:
            yield Path(where, name)


def _digest_in(name: str) -> str:
    """Return the digest that the name of a quarantined file ends with: `UID.DIGEST.dcm`."""
    return name.removesuffix(".dcm").rpartition(".")[2]


def _sop_instance_uid(path: Path) -> str:
    """Return what the name of a file says: `UID.dcm` as received, `UID.DIGEST.dcm` for a result."""
    name = path.name.removesuffix(".dcm")
    stem, _, last = name.rpartition(".")
    is_digest = len(last) == 16 and path.parent.parent.name == "results"
    return stem if is_digest else name


def _file_digest(file: BinaryIO) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # a file, whatever typeshed says


def _digest_as_received(file: BinaryIO, item: Item) -> str:
    """Return the digest of the data set; raise ValueError where the meta information is about something else."""
    digest = dataset_digest(file, item.digest)
    file.seek(0)
    head = file.read(_META_HEAD)
    meta = file.read(int.from_bytes(head[-4:], "little"))
    for tag, uid in ((b"\x02\x00\x03\x00", item.sop_instance_uid), (b"\x02\x00\x10\x00", item.transfer_syntax_uid)):
        value = uid.encode() + b"\0" * (len(uid) % 2)
        if tag + b"UI" + len(value).to_bytes(2, "little") + value not in meta:
            raise ValueError("its file meta information is about another instance or transfer syntax")
    return digest
