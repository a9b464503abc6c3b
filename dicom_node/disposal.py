"""What retention lets go goes: rows first, in one transaction, then files; a crash in between is made good.

The files of a study are moved to a folder of their own within the transaction that deletes its rows, so that whatever
arrives for the same study meanwhile finds its names free. The ledger says of each such folder whether the transaction
was committed: then its files go, else they return to where they were.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePath

import structlog

from dicom_node.audit import Audit
from dicom_node.config import Settings
from dicom_node.errors import Unavailable
from dicom_node.ledger import Ledger
from dicom_node.ledger.departures import Departed
from dicom_node.retention import DAY, SETTLED, Ground, Study, departures, judge
from dicom_node.spool import Spool

log = structlog.get_logger()

_PAUSE = 60.0  # seconds between two rounds
_STUDIES = 10  # in one round; where there are more the next begins at once
_AT_ONCE = 200  # studies that are judged together
_EVENTS = 2000  # looked at in one round
_MEGABYTE = 1024 * 1024


class _NotHere(Exception):
    """No file of the study is in this storage: another node has it."""


class Disposal:
    """Deletes what may be deleted."""

    def __init__(self, settings: Settings, ledger: Ledger, spool: Spool, audit: Audit, *, node_id: str) -> None:
        """Delete rows of `ledger` and files of `spool` as `settings.retention` says; report it to `audit`."""
        self._retention = settings.retention
        self._ledger = ledger
        self._spool = spool
        self._audit = audit
        self._node_id = node_id
        self._departing = spool.storage / "departing"
        self._round_at = float("-inf")
        self._elsewhere: set[str] = set()
        self._event_id = 0

    def recover(self) -> None:
        """Finish what an earlier life, or a ledger that was away, left undone."""
        for folder in sorted(self._departing.iterdir()) if self._departing.is_dir() else ():
            departed = self._ledger.departures.departed(folder.name)
            try:
                if departed is not None:
                    self._finish(departed, folder)
                else:
                    log.warning("deletion.undone")
                    _put_back(folder, self._spool.storage)
            except OSError as error:
                raise Unavailable(f"The files of a deletion cannot be moved: {error.strerror}") from error
        self._ledger.departures.files_are_gone(node_id=self._node_id)

    def _finish(self, departed: Departed, folder: Path) -> None:
        """Report a deletion whose rows are gone, and delete its files; a crash in between reports it twice."""
        reason = {
            Ground.AGE: "older than retention.days",
            Ground.FREE_SPACE: "free space below retention.free_megabytes",
        }
        uid = departed.study_instance_uid
        self._audit.deleted(uid, departed.sop_classes, reason=reason[departed.ground], files=folder)
        shutil.rmtree(folder)
        log.info(
            "study.deleted", study_instance_uid=uid, ground=departed.ground, files=sum(departed.sop_classes.values())
        )

    def tick(self, *, now: float) -> int:
        """Delete what is due, at most once a minute and a few studies; return how many."""
        if 0 <= now - self._round_at < _PAUSE:
            return 0
        self.recover()
        self._empty_quarantine(now)
        self._forget_history(now)
        number = self._round(now)
        if number < _STUDIES:  # else, as where something raises, the next round begins at once
            self._round_at = now
        return number

    # -- studies --------------------------------------------------------------------------------------------

    def _round(self, now: float) -> int:
        is_low = self._missing() > 0
        if not self._retention.days and not is_low:
            return 0
        number = 0
        for study, ground in self._going(is_low, now):
            if number == _STUDIES or (ground is Ground.FREE_SPACE and self._missing() <= 0):
                break
            number += self._delete(study, is_low, now)
        return number

    def _missing(self) -> int:
        """Return how many bytes there are too few."""
        wanted = self._retention.free_megabytes * _MEGABYTE
        return wanted - shutil.disk_usage(self._spool.storage).free if wanted else 0

    def _going(self, is_low: bool, now: float) -> Iterator[tuple[Study, Ground]]:
        """Yield what may go, the oldest first; so many are judged as are asked for."""
        silence = SETTLED if is_low else self._retention.days * DAY
        uids = self._ledger.departures.candidates(silent_since=now - silence)
        for start in range(0, len(uids), _AT_ONCE):
            some = [uid for uid in uids[start : start + _AT_ONCE] if uid not in self._elsewhere]
            studies = self._ledger.departures.studies(some)
            yield from departures(studies, self._retention.policy, is_low=is_low, now=now)

    def _delete(self, study: Study, is_low: bool, now: float) -> bool:
        folder = self._departing / uuid.uuid4().hex

        def still(found: Study) -> Ground | None:
            verdict = judge(found, self._retention.policy, is_low=is_low, now=now)
            return verdict if isinstance(verdict, Ground) else None

        def set_aside(instances: Sequence[str], results: Sequence[str]) -> None:
            if not _set_aside(self._spool.storage, folder, instances, results):
                raise _NotHere
            self._spool.forget_folders()

        uid = study.study_instance_uid
        try:
            departed = self._ledger.departures.delete(
                uid, folder.name, node_id=self._node_id, judge=still, set_aside=set_aside, now=now
            )
        except _NotHere:
            log.warning("study.not_here", study_instance_uid=uid)
            self._elsewhere.add(uid)
            departed = None
        except OSError as error:
            raise Unavailable(f"A study cannot be deleted: {error.strerror}") from error
        self.recover()
        return departed is not None

    # -- what has no study ----------------------------------------------------------------------------------

    def _empty_quarantine(self, now: float) -> None:
        days = self._retention.quarantine_days
        folder = self._spool.storage / "quarantine"
        if not days or not folder.is_dir():
            return
        old = [path for path in folder.iterdir() if now - path.stat().st_mtime >= days * DAY]
        for path in old:
            path.unlink(missing_ok=True)
        if old:
            self._ledger.history.note("quarantine.deleted", now=now, files=len(old))
            log.info("quarantine.deleted", files=len(old))

    def _forget_history(self, now: float) -> None:
        if not self._retention.history_days:
            return
        before = now - self._retention.history_days * DAY
        last = self._ledger.departures.forget_events(before=before, after=self._event_id, limit=_EVENTS)
        self._event_id = last or 0  # from the beginning again, once all have been looked at
        self._ledger.departures.forget_requests(before=before)


def _set_aside(storage: Path, folder: Path, instances: Sequence[str], results: Sequence[str]) -> bool:
    """Move the files of a study to `folder`, under the same relative paths; return whether there was any.

    What lies among them and is not of the study's rows is arriving this moment: it stays.
    """
    known = set(instances)
    moved = False
    for series in sorted({PurePath(path).parent for path in instances}):
        if not _move(storage / series, folder / series):
            continue
        moved = True
        for path in list((folder / series).iterdir()):
            if str(series / path.name) not in known:
                _move(path, storage / series / path.name)
        with suppress(OSError):  # another series is there still
            (storage / series.parent).rmdir()
    for result in results:
        moved |= _move(storage / result, folder / result)
    if moved:
        _sync([*folder.rglob("*"), folder, folder.parent, storage])
        _sync((storage / path).parent.parent for path in instances[:1])
        _sync({(storage / path).parent for path in results})
    return moved


def _put_back(folder: Path, storage: Path) -> None:
    """Move the files in `folder` to where they were: the ledger still knows them."""
    targets = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        targets.append(storage / path.relative_to(folder))
        _move(path, targets[-1])
    _sync({parent for target in targets for parent in target.parents if parent.is_relative_to(storage)})
    shutil.rmtree(folder)


def _move(source: Path, target: Path) -> bool:
    """Rename; return whether there was anything to rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except FileNotFoundError:
        return False
    return True


def _sync(paths: Iterable[Path]) -> None:
    for folder in sorted({path for path in paths if path.is_dir()}):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
