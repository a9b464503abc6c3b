"""What has arrived becomes rows of the ledger, in groups; what the ledger missed is made good at the next start.

An instance that was acknowledged lies in the inbox until its row is committed and its place among the studies durable.
So the ledger may be away, or the node may die, at any moment: the inbox says what is still to be recorded.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import structlog

from dicom_node import native
from dicom_node.audit import Transfers, Visit
from dicom_node.digest import digesting_like
from dicom_node.entities import AssociationIdentity, Header, Instance
from dicom_node.errors import InvalidInstance, LedgerUnavailable, Refused, Unavailable
from dicom_node.gathering import Gathering
from dicom_node.header import read_header
from dicom_node.ledger import Ledger
from dicom_node.ledger.arrivals import AssociationEnd
from dicom_node.ledger.journal import Subject
from dicom_node.part10 import read_origin
from dicom_node.spool import Spool

log = structlog.get_logger()

_GROUP = 1000  # instances in one transaction: a series as a rule; who records keeps who receives from the interpreter
_GATHER = 1.0  # seconds in which a group comes together, unless an association ends or somebody waits
_BACKLOG = 20_000  # instances that wait for a ledger that is away, before no more are let in
_TOLD_SOON = 0.002  # seconds until it is looked again whether what has been acknowledged has arrived here
_PAUSE = 0.25  # seconds before a ledger that is away is tried again


class Outcome(StrEnum):
    """What became of an instance that was acknowledged."""

    STORED = "stored"
    DUPLICATE = "duplicate"  # the same bytes are held already
    QUARANTINED = "quarantined"  # other bytes under the same SOP Instance UID: the first stay, these are set aside


class Arrival(NamedTuple):
    """One instance in the inbox: durable, acknowledged, not recorded yet."""

    header: Header
    transfer_syntax_uid: str
    path: str
    digest: str  # of the data set, hex
    size: int  # bytes of the file
    association: AssociationIdentity
    at: float  # seconds since the epoch


@dataclass(frozen=True, slots=True)
class Ended:
    """An association has ended; `released` says that it ended as it should."""

    identity: AssociationIdentity
    released: bool
    at: float
    seconds: float = 0.0
    bytes: int = 0
    refused: int = 0


@dataclass(slots=True)
class Brought:
    """What an association has brought so far, as far as it is recorded."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)
    transfers: Transfers = field(default_factory=Transfers)

    def add(self, header: Header, outcome: Outcome) -> None:
        """Count one instance."""
        self.outcomes[outcome] += 1
        self.transfers.add(header, outcome)


_Item = Arrival | Ended | threading.Event


class Recorder:
    """The one thread that writes what has arrived."""

    def __init__(
        self,
        ledger: Ledger,
        spool: Spool,
        *,
        node_id: str,
        on_end: Callable[[Sequence[Visit]], None] = lambda visits: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Record in `ledger` what lies in the inbox of `spool`; tell `on_end` what associations have brought."""
        self._on_end = on_end
        self._ledger = ledger
        self._spool = spool
        self._node_id = node_id
        self._clock = clock
        self._waiting = Gathering[_Item](most=_GROUP, seconds=_GATHER)
        self._brought: dict[str, Brought] = {}
        self._acknowledged: set[object] = set()  # some that have been, or are just being, and have not arrived here
        self._recorded: list[str] = []  # on record, and to be taken out of the inbox
        self._is_away = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    # -- life -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Record what an earlier life left, then whatever arrives."""
        self.recover()
        self._thread.start()

    def stop(self, *, grace: float = 10.0) -> None:
        """Record what has arrived; where the ledger is away, the next life does."""
        if self._thread.is_alive():
            self._waiting.close()
            self._thread.join(grace)
            self._stop.set()
            self._thread.join()

    def recover(self) -> int:
        """Put whatever lies in the inbox into the queue, and throw away what was never whole; return how many."""
        found = [arrival for path in self._spool.inbox.waiting() if (arrival := self._recovered(path)) is not None]
        for arrival in found:
            self.arrived(arrival)
        for identity in dict.fromkeys(arrival.association for arrival in found):
            self.ended(Ended(identity, released=False, at=self._clock()))
        if found:
            log.warning("inbox.recovered", instances=len(found))
        return len(found)

    def _recovered(self, path: Path) -> Arrival | None:
        """Return what a file in the inbox is; None where it was never whole, and so never acknowledged."""
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
                origin = read_origin(mapped)
                with memoryview(mapped) as whole, whole[origin.data_set_at :] as dataset:
                    digest = digesting_like((origin.digest or b"").hex())
                    digest.update(dataset)
                    if digest.digest() != origin.digest:
                        raise ValueError("torn")
                    header = read_header(dataset, origin.transfer_syntax_uid)
                size = len(mapped)
        except (ValueError, InvalidInstance):
            log.warning("inbox.torn")
            path.unlink(missing_ok=True)
            return None
        title = origin.source_application_entity_title
        identity = AssociationIdentity(f"recovered {title}", title, "", "")
        return Arrival(header, origin.transfer_syntax_uid, str(path), digest.hexdigest(), size, identity, self._clock())

    # -- told -----------------------------------------------------------------------------------------------

    def require_room(self) -> None:
        """Raise LedgerUnavailable where too much waits for a ledger that is away."""
        if len(self._waiting) >= _BACKLOG:
            raise LedgerUnavailable("The ledger does not answer")

    def arrived(self, arrival: Arrival) -> None:
        """Take what is durable."""
        self._waiting.put(arrival)

    @contextmanager
    def acknowledging(self) -> Iterator[None]:
        """Let instances be acknowledged of which `arrived` is told before the end: `flush` waits for that."""
        some = object()
        self._acknowledged.add(some)
        try:
            yield
        finally:
            self._acknowledged.discard(some)

    def ended(self, ended: Ended) -> None:
        """Take that an association has ended: after whatever it has sent."""
        self._waiting.put(ended, at_once=True)

    def flush(self, *, timeout: float = 10.0) -> bool:
        """Wait until everything that has been acknowledged by now is recorded; return whether it is."""
        until, untold = time.monotonic() + timeout, set(self._acknowledged)
        while untold & self._acknowledged and time.monotonic() < until:
            time.sleep(_TOLD_SOON)
        if untold & self._acknowledged:
            return False
        reached = threading.Event()
        self._waiting.put(reached, at_once=True)
        if not self._thread.is_alive():
            self.drain()
        if not reached.wait(max(0.0, until - time.monotonic())):
            return False
        return self._spool.inbox.wait_for_others(timeout=max(0.0, until - time.monotonic()))

    # -- recorded -------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Record what is in the queue now, in the calling thread; raise Unavailable where that cannot be."""
        group = self._waiting.take_all()
        try:
            self._record(group)
        finally:
            for item in group:  # what could not be
                self._waiting.put(item)

    def _run(self) -> None:
        while group := self._waiting.take():
            while not self._attempted(group):
                if self._stop.wait(_PAUSE):
                    return

    def _attempted(self, group: list[_Item]) -> bool:
        """Record a group; return False where what is left of it has to be tried again."""
        try:
            self._record(group)
        except Unavailable as error:
            if not self._is_away:
                log.error("recorder.waiting", reason=str(error))
            self._is_away = True
            return False
        except Refused as error:
            if len(group) == 1:
                log.error("recorder.refused", reason=str(error))
            return self._attempted_one_by_one(group)
        except Exception as error:  # a defect of ours must cost no other instance, and not this one its file
            log.exception("recorder.defect", error=type(error).__name__)
            return self._attempted_one_by_one(group)
        self._is_away = False
        return True

    def _attempted_one_by_one(self, group: list[_Item]) -> bool:
        if len(group) == 1:
            return True  # what cannot be recorded stays in the inbox, for the next life
        while group:
            if not self._attempted([group[0]]):
                return False
            del group[0]
        return True

    def _record(self, group: list[_Item]) -> None:
        """Record a group, and take out of it what is: a second attempt is about the rest."""
        self._record_arrivals([item for item in group if isinstance(item, Arrival)])
        group[:] = [item for item in group if not isinstance(item, Arrival)]
        self._record_ends([item for item in group if isinstance(item, Ended)])
        reached = [item for item in group if isinstance(item, threading.Event)]
        group.clear()
        for event in reached:
            event.set()

    def _record_arrivals(self, arrivals: Sequence[Arrival]) -> None:
        """Place the files, commit their rows, and only then take them out of the inbox."""
        if arrivals:
            with self._spool.placing():
                outcomes = self._placed(arrivals)
            self._count(arrivals, outcomes)

    def _placed(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        held = self._ledger.arrivals.held([arrival.header.sop_instance_uid for arrival in arrivals])
        outcomes: list[Outcome] = []
        new: dict[str, tuple[Instance, AssociationIdentity, float]] = {}
        places: list[tuple[str, str]] = []
        again: list[tuple[Header, AssociationIdentity]] = []
        aside: list[tuple[Subject, str]] = []
        for arrival in arrivals:
            header = arrival.header
            known = held.get(header.sop_instance_uid)
            first = new.get(header.sop_instance_uid)
            digest = first[0].digest if first else known.digest if known else None
            if digest is None:
                path = self._spool.place_of(header)
                places.append((arrival.path, path))
                instance = Instance(header, arrival.transfer_syntax_uid, path, arrival.digest, arrival.size)
                new[header.sop_instance_uid] = instance, arrival.association, arrival.at
                outcomes.append(Outcome.STORED)
            elif self._spool.is_same(arrival.path, arrival.digest, digest):
                again.append((header, arrival.association))
                if known and self._spool.heal(arrival.path, known.path):
                    log.warning("instance.healed")  # its file was gone
                outcomes.append(Outcome.DUPLICATE)
            else:
                path = self._spool.set_aside(arrival.path, header, arrival.digest)
                aside.append((Subject(header.study_instance_uid, header.series_instance_uid), path))
                outcomes.append(Outcome.QUARANTINED)
        self._spool.settle(places)
        self._spool.sync(path for _, path in [*places, *aside])
        self._ledger.arrivals.record(list(new.values()), again, aside, node_id=self._node_id, now=self._clock())
        self._recorded += [arrival.path for arrival in arrivals]
        self._take_out()
        return outcomes

    def _count(self, arrivals: Sequence[Arrival], outcomes: Sequence[Outcome]) -> None:
        for arrival, outcome in zip(arrivals, outcomes, strict=True):
            self._brought.setdefault(arrival.association.association_id, Brought()).add(arrival.header, outcome)
            if outcome is Outcome.QUARANTINED:
                log.warning("instance.quarantined", calling_ae_title=arrival.association.calling_ae_title)

    def _take_out(self) -> None:
        """Take out of the inbox what is on record; what a broken disk keeps there is tried again with the next group.

        Should the node end before, its next life finds that the ledger knows these bytes.
        """
        left = []
        for path in self._recorded[native.unlink(self._recorded) :]:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.error("inbox.not_emptied", reason=error.strerror)
                left.append(path)
        self._recorded = left

    def _record_ends(self, ends: Sequence[Ended]) -> None:
        # who was refused something comes again: that the rest has no gap is no evidence then
        self._ledger.arrivals.associations_ended(
            [AssociationEnd(each.identity.association_id, each.released and not each.refused, each.at) for each in ends]
        )
        brought = [self._brought.pop(each.identity.association_id, Brought()) for each in ends]
        pairs = list(zip(ends, brought, strict=True))
        self._on_end([Visit(ended.identity, what.transfers, ended.released) for ended, what in pairs])
        for ended, what in pairs:
            _log_end(ended, what)


def _log_end(ended: Ended, brought: Brought) -> None:
    outcomes = {str(outcome): number for outcome, number in brought.outcomes.items()}
    if ended.refused:
        outcomes["refused"] = ended.refused
    if outcomes:
        log.info(
            "association.ended",
            calling_ae_title=ended.identity.calling_ae_title,
            address=ended.identity.address,
            how="released" if ended.released else "not released",
            seconds=round(ended.seconds, 2),
            megabytes=round(ended.bytes / 1e6, 3),
            **outcomes,
        )
