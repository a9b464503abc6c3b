"""Bytes on disk: a temporary file, fsync, a name that was free, fsync of the folder. Nothing is ever overwritten."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dicom_node import native
from dicom_node.disk import Bytes, availability, sync_folder, write_all
from dicom_node.entities import Header
from dicom_node.errors import SettingsError
from dicom_node.inbox import Inbox
from dicom_node.part10 import dataset_digest
from dicom_node.watermark import Watermark

_REMEMBERED = 10_000  # folders known to exist


class Draft:
    """A file that is being written and has no place yet; gone at the end of a `with` block, if it was given none."""

    def __init__(self, path: Path) -> None:
        """Make the file."""
        self.path = path
        self.size = 0  # bytes
        self._digest = hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    @property
    def sha256(self) -> str:
        """Return the digest (hex) of what has been written."""
        return self._digest.hexdigest()

    def write(self, piece: Bytes) -> None:
        """Write all of a piece."""
        self._digest.update(piece)
        self.size += write_all(self._descriptor, piece)

    def sync(self) -> None:
        """Make what has been written durable."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Delete the file, where it still has the name that it was made with."""
        os.close(self._descriptor)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Draft:
        """Return the draft."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class Spool:
    """The storage folder: `arrived/`, `studies/` as received, `results/` as encoded, `quarantine/`, `incoming/`."""

    def __init__(self, storage: Path, *, minimum_free: int = 0, part: int = 0, parts: int = 1) -> None:
        """Use the folder `storage`; refuse to write below `minimum_free` bytes of free space.

        Of `parts` processes that receive, this is number `part`; 0 is the node's own.
        """
        self.storage = storage
        self._root = str(storage)
        self._watermark = Watermark(storage, minimum_free)
        self._incoming = storage / "incoming"
        self.inbox = Inbox(storage, part=part, parts=parts)
        self._is_alone = parts == 1
        self._known: set[Path | str] = set()
        self._lock: int | None = None
        with availability():
            self._make(self._incoming)

    def own(self) -> None:
        """Take the folder for this process until it ends; raise SettingsError where another has it.

        A second node on the same folder would sweep away what the first is writing and end its broker.
        """
        with availability():
            descriptor = os.open(self.storage / "node.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise SettingsError(f"node.storage: another node runs on {self.storage}") from error
        self._lock = descriptor
        self.inbox.own()

    def disown(self) -> None:
        """Give the folder back."""
        self.inbox.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def absolute(self, path: str) -> Path:
        """Return where a path that the ledger holds lies."""
        return self.storage / path

    def require_room(self, size: int = 0) -> None:
        """Raise SpoolFull where free space is below the watermark, or `size` more bytes would bring it there."""
        with availability():
            self._watermark.require_room(size)

    def watch_room(self, note: Callable[[str, int], None]) -> None:
        """Have `note` write down that the door for what arrives has been shut or opened: the event, free bytes."""
        with availability():
            self._watermark.tell(note)

    def place_of(self, header: Header) -> str:
        """Return the path that an instance has among the studies."""
        return f"studies/{header.study_instance_uid}/{header.series_instance_uid}/{header.sop_instance_uid}.dcm"

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Let no other process give arrived files their places until the end: what the ledger knows stays as it is."""
        if self._is_alone:
            yield
            return
        with availability():
            descriptor = os.open(self.storage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # a process that is killed lets go
            yield
        finally:
            os.close(descriptor)

    def settle(self, arrived: Sequence[tuple[str, str]]) -> None:
        """Give arrived files their paths; `sync` makes that durable.

        The ledger does not know the instances yet, so another file of such a name can only be what a crash left
        behind before it was recorded: it is replaced.
        """
        with availability():
            for folder in {path.rpartition("/")[0] for _, path in arrived}:
                self._make_known(folder)
        done = native.link([(file, f"{self._root}/{path}") for file, path in arrived])
        for file, path in arrived[done:]:
            self._link(file, path)

    def heal(self, arrived: str, path: str) -> bool:
        """Give an arrived file the place of a file with the same bytes that is gone; return whether it was."""
        if os.path.lexists(f"{self._root}/{path}"):
            return False
        self._link(arrived, path)
        self.sync([path])
        return True

    def set_aside(self, arrived: str, header: Header, digest: str) -> str:
        """Give an arrived file whose UID is taken by other bytes its place in quarantine; return its path."""
        path = f"quarantine/{header.sop_instance_uid}.{digest}.dcm"
        self._link(arrived, path)
        return path

    def _link(self, arrived: str, path: str) -> None:
        folder, target = path.rpartition("/")[0], f"{self._root}/{path}"
        with availability():
            self._make_known(folder)
            try:
                os.link(arrived, target)
            except FileNotFoundError:  # somebody has deleted a folder that we remember
                self._known.clear()
                self._make(self.storage / folder)
                os.link(arrived, target)
            except FileExistsError:
                if not os.path.samefile(arrived, target):
                    os.unlink(target)
                    os.link(arrived, target)

    def _make_known(self, folder: str) -> None:
        if folder not in self._known:
            self._make(self.storage / folder)
            self._known.add(folder)

    def sync(self, paths: Iterable[str]) -> None:
        """Make the names of files durable that were given their places."""
        with availability():
            for folder in sorted({path.rpartition("/")[0] for path in paths}):
                sync_folder(self.storage / folder)

    def keep_result(self, sop_instance_uid: str, content: Bytes) -> tuple[str, str]:
        """Write an encoded result object; return its path and the SHA-256 (hex) of the file.

        The digest is part of the name: a worker that lost its lease and still writes the same object, with
        other times in it, must not change the bytes that the ledger knows and that a peer may hold already.
        """
        with self.draft([content]) as draft:
            return self.keep_draft(sop_instance_uid, draft), draft.sha256

    def draft(self, pieces: Iterable[Bytes]) -> Draft:
        """Write an encoded result object, piece by piece, to where nobody looks for it yet."""
        with availability():
            self._make(self._incoming)
            draft = Draft(self._incoming / uuid.uuid4().hex)
            try:
                for piece in pieces:
                    draft.write(piece)
            except BaseException:
                draft.close()
                raise
        return draft

    def keep_draft(self, sop_instance_uid: str, draft: Draft) -> str:
        """Make a draft durable and give it its place among the results; return its path."""
        path = Path("results", sop_instance_uid[-2:], f"{sop_instance_uid}.{draft.sha256[:16]}.dcm")
        with availability():
            try:
                draft.sync()
                target = self.storage / path
                self._make(target.parent)
                os.replace(draft.path, target)
                sync_folder(target.parent)
            except BaseException:
                self._known.clear()  # somebody may have deleted a folder that we remember
                raise
        return str(path)

    def forget_other_results(self, sop_instance_uid: str, path: str) -> None:
        """Delete the files that other attempts wrote for the result whose one file is `path`."""
        kept = self.absolute(path)
        for other in kept.parent.glob(f"{sop_instance_uid}.*.dcm"):
            if other != kept:
                other.unlink(missing_ok=True)

    def is_same(self, arrived: str, digest: str, held: str) -> bool:
        """Return whether an arrived file with this digest has the data set whose digest, perhaps a SHA-256, is held."""
        return digest == held or (len(digest) != len(held) and self.is_intact(arrived, held))

    def is_intact(self, path: str, digest: str) -> bool:
        """Return whether a received file is there and its data set is the one with this digest; reads all of it."""
        try:
            with self.absolute(path).open("rb") as file:
                return dataset_digest(file, digest) == digest
        except (OSError, ValueError):
            return False

    def forget_folders(self) -> None:
        """Forget which folders are there: some have been moved away."""
        self._known.clear()

    def sweep_incoming(self, *, older_than: float = 0.0) -> int:
        """Delete temporary files that nobody writes any more, `older_than` seconds; return of how many with content.

        At the start of the node all are such; later, those of workers that were killed are.
        """
        before, swept = time.time() - older_than, 0
        with availability():
            for path in [*self._incoming.iterdir(), *(() if older_than else self.inbox.unfinished())]:
                with suppress(FileNotFoundError):
                    about = path.stat()
                    if not older_than or about.st_mtime < before:
                        path.unlink()
                        swept += about.st_size > 0
        return swept

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
            sync_folder(folder.parent)
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known.add(folder)
