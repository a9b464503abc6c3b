"""One instance, from its first byte to a durable file: checked, named, synced. Only then may it be acknowledged.

The ledger follows: see `recorder`. What was acknowledged and is not recorded yet lies in the inbox.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import structlog
from pydicom.uid import ImplicitVRLittleEndian

from dicom_node.digest import digesting, feed
from dicom_node.disk import Bytes
from dicom_node.entities import AssociationIdentity, Header
from dicom_node.errors import InvalidInstance, Unavailable
from dicom_node.header import WANTED, header_of, is_plain, read_beginning, read_header
from dicom_node.inbox import Arriving, Slot
from dicom_node.landing import pour
from dicom_node.native import LONGEST_RUN, PROGRESS, WHOLE, Plan, Reply, Taken
from dicom_node.part10 import around, lead_length, preamble, vouching
from dicom_node.recorder import Arrival, Recorder
from dicom_node.services import Status
from dicom_node.spool import Spool

log = structlog.get_logger()


class Intake:
    """The durable half of C-STORE, without the network."""

    def __init__(self, spool: Spool, recorder: Recorder, *, clock: Callable[[], float] = time.time) -> None:
        """Keep bytes in `spool`; hand what is kept to `recorder`."""
        self._spool = spool
        self._recorder = recorder
        self._clock = clock

    def begin(
        self,
        *,
        affected_sop_class_uid: str,
        affected_sop_instance_uid: str,
        transfer_syntax_uid: str,
        association: AssociationIdentity,
        room: memoryview | None = None,
        expected: int = 0,
    ) -> Incoming:
        """Open a file for what a C-STORE command announces; raise Unavailable where nothing can be kept now.

        Its bytes go through `room`, where there is one that is nobody else's meanwhile; `expected` is how many there
        may be.
        """
        self._recorder.require_room()
        self._spool.require_room()
        named = affected_sop_class_uid, affected_sop_instance_uid
        head = preamble(*named, transfer_syntax_uid, association.calling_ae_title, expected=expected)
        file = self._spool.inbox.open(lead=len(head), room=room)
        return Incoming(self, file, head, named, transfer_syntax_uid, association, expected)

    def keep(self, dataset: Bytes, **command: object) -> Header:
        """Keep a data set that is in memory already; `command` is what `begin` takes.

        Raises:
            InvalidInstance: the data is no dataset (0xC000) or contradicts its command (0xA900).
            Unavailable: it cannot be kept now (0xA700); nothing of it remains.
        """
        incoming = self.begin(**command)  # type: ignore[arg-type]
        try:
            pour(memoryview(dataset), incoming)
            return incoming.keep()
        finally:
            incoming.close()

    def spare(self, number: int) -> list[Slot]:
        """Return empty files for so many instances more, or fewer."""
        return self._spool.inbox.spare(number)

    def give_back(self, slots: list[Slot], *, is_written: bool) -> None:
        """Take back empty files that were not needed; to the first something may have been written."""
        self._spool.inbox.give_back(slots, is_written=is_written)

    def acknowledging(self) -> AbstractContextManager[None]:
        """Let instances be acknowledged that are handed on before the end."""
        return self._recorder.acknowledging()

    def kept(self, header: Header, path: str, digest: str, size: int, incoming: Incoming) -> None:
        """Hand on what is durable now."""
        self._recorder.arrived(
            Arrival(header, incoming.transfer_syntax_uid, path, digest, size, incoming.association, self._clock())
        )

    def has_room(self, size: int) -> bool:
        """Return whether `size` more bytes leave free space above the watermark, and count them if they do."""
        try:
            self.require_room(size)
        except Unavailable:
            return False
        return True

    def require_room(self, size: int) -> None:
        """Raise SpoolFull where `size` more bytes would bring free space below the watermark."""
        self._spool.require_room(size)


class Incoming:
    """One instance while it is being received; close it, whatever became of it."""

    def __init__(
        self,
        intake: Intake,
        file: Arriving,
        head: bytes,
        named: tuple[str, str],
        transfer_syntax_uid: str,
        association: AssociationIdentity,
        expected: int,
    ) -> None:
        """Write to `file`, after room for `head`, which stands before the data set and vouches for the whole of it."""
        self._intake = intake
        self._file = file
        self._named = named
        self._head = head
        self._expected = expected
        self._following: list[Slot] = []  # empty files for what may follow it
        self._digest = digesting()
        self._beginning: tuple[Header, int] | None = None
        self.received = 0  # bytes of the data set
        self.room = file.room  # where its next bytes go: at least one
        self.transfer_syntax_uid = transfer_syntax_uid
        self.association = association

    def took(self, number: int) -> None:
        """Note that so many bytes have come into the room; raise Unavailable where they cannot be kept."""
        self._intake.require_room(number)
        fragment = self.room()[:number]
        if not self.received:  # while it is at hand: what stands before the pixel data seldom needs more
            self._beginning = read_beginning(fragment, self.transfer_syntax_uid)
        feed(self._digest, fragment)
        self._file.took(number)
        self.received += number

    def take(self, filling: Callable[[Plan], Taken], *, following: int, maximum: int) -> Taken:
        """Have C take it, and up to so many like it, none of them larger than `maximum` bytes; return how far it got.

        What has landed is handed on. PROGRESS, and nothing taken, where Python has to look at each.
        """
        plan = self._plan(following, maximum)
        if plan is None:
            return Taken(PROGRESS)
        with self._intake.acknowledging():
            taken = filling(plan)
            self._landed(taken)
        return taken

    def _plan(self, following: int, maximum: int) -> Plan | None:
        descriptor, memory = self._file.planned()
        if len(memory) > maximum or not is_plain(self.transfer_syntax_uid):
            return None
        number = min(1 + following, LONGEST_RUN)
        if len(self._head) != lead_length(self._expected):
            return None  # a name that is none
        if not self._intake.has_room(number * len(memory)):
            return None
        self._following = self._intake.spare(number - 1)
        descriptors = [descriptor, *(slot.descriptor for slot in self._following)]
        before, behind = around(self._named[0], self.transfer_syntax_uid, self.association.calling_ae_title)
        is_implicit = self.transfer_syntax_uid == ImplicitVRLittleEndian
        return Plan(descriptors, memory, before, behind, self._expected, is_implicit, WANTED)

    def _landed(self, taken: Taken) -> None:
        """Hand on what C has made durable: this one, and those that followed it."""
        paths = [self._file.path, *(slot.path for slot in self._following)]
        unused, self._following = self._following[max(0, len(taken.landed) - 1) :], []
        self._intake.give_back(unused, is_written=bool(taken.landed) and taken.reason == WHOLE)
        if taken.landed:
            self._file.landed()
        for path, landed in zip(paths, taken.landed, strict=False):
            size = landed.lead + landed.size
            try:
                self._intake.kept(header_of(landed.values), path, landed.digest.hex(), size, self)
            except Exception as error:  # it has been acknowledged: the next start finds it
                log.exception("store.defect", error=type(error).__name__)

    def keep(self, reply: Reply | None = None) -> Header:
        """Check the whole and make it durable; on return it may be acknowledged, or has been with `reply`.

        Raises:
            InvalidInstance: the data is no dataset (0xC000) or contradicts its command (0xA900).
            Unavailable: it cannot be kept now (0xA700); nothing of it remains.
        """
        header = self._checked()
        with self._intake.acknowledging():
            self._file.keep(vouching(self._head, self._digest.digest()), reply)
            self._intake.kept(header, self._file.path, self._digest.hexdigest(), self._file.size, self)
        return header

    def _checked(self) -> Header:
        if self._beginning is None:
            with self._file.whole() as whole, whole[len(self._head) :] as dataset:
                header = read_header(dataset, self.transfer_syntax_uid)
        else:
            header, end = self._beginning
            if self.received < end:
                raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set is cut off")
        for found, named, tag, keyword in zip(
            (header.sop_class_uid, header.sop_instance_uid), self._named, _TAGS, _KEYWORDS, strict=True
        ):
            if found != named:  # PS3.4 B.2.3
                comment = f"{keyword} differs from the command's"
                raise InvalidInstance(Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS, comment, tag)
        return header

    def close(self) -> None:
        """Let go of the file; what was not kept is gone."""
        self._file.close()


_TAGS = 0x00080016, 0x00080018
_KEYWORDS = "SOPClassUID", "SOPInstanceUID"
