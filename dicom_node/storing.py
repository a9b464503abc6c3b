"""One C-STORE, from its command to its answer, whichever way its bytes come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from dicom_node.associations import Associations, Opened
from dicom_node.errors import InvalidInstance, Unavailable
from dicom_node.intake import Incoming
from dicom_node.native import PROGRESS, Landed, Plan, Reply, Taken
from dicom_node.services import SUCCESS, Answer, Status

log = structlog.get_logger()
Argument = TypeVar("Argument")

_WASTE = memoryview(bytearray(1 << 18))  # what comes for nothing: written by everybody, read by nobody


class Storing:
    """Takes a data set into a file, piece by piece; the first thing that goes wrong is the answer."""

    def __init__(
        self, associations: Associations, opened: Opened, begin: Callable[[], Incoming], *, maximum: int
    ) -> None:
        """Write to what `begin` opens, `maximum` bytes at most."""
        self._associations = associations
        self._opened = opened
        self._maximum = maximum
        self._incoming: Incoming | None = None
        self._refusal: Answer | None = None
        self._try(self._begun, begin)

    def room(self) -> memoryview:
        """Return where the next bytes go; those of one that is refused already go where nobody looks."""
        incoming = self._incoming
        return _WASTE if incoming is None else incoming.room()

    def take(self, filling: Callable[[Plan], Taken]) -> Taken:
        """Let C take it, and what follows and is like it, where it may; return how far it got."""
        opened, incoming = self._opened, self._incoming
        if incoming is None:
            return Taken(PROGRESS)
        self._associations.begin_work(opened)
        try:
            # as many more as have come: one image keeps no files for sixteen
            taken = incoming.take(filling, following=opened.stored, maximum=self._maximum)
            self._count_landed(taken.landed)
            return taken
        finally:
            self._associations.end_work(opened)

    def _count_landed(self, landed: Sequence[Landed]) -> None:
        if not landed:
            return
        opened = self._opened
        opened.stored += len(landed)
        opened.bytes += sum(each.size for each in landed)
        opened.latest = landed[-1].size
        self.abandon()

    def took(self, number: int) -> None:
        """Note that so many bytes have come into the room."""
        if self._refusal is None:
            self._try(self._taken, number)

    def answer(self, reply: Reply | None = None) -> Answer:
        """Make durable what was taken, and return what to answer.

        `reply` says that all went well; it is sent as soon as that is true, if it can be, and says whether it was.
        """
        opened = self._opened
        self._associations.begin_work(opened)
        try:
            if self._refusal is None:
                self._try(self._kept, reply)
            self._count()
        finally:
            self._associations.end_work(opened)
        if self._refusal is None:
            return SUCCESS
        self._log(self._refusal)
        return self._refusal

    def _count(self) -> None:
        self.abandon()
        if self._refusal is None:
            self._opened.stored += 1
        else:
            self._opened.refused += 1

    def _log(self, refusal: Answer) -> None:
        title = self._opened.identity.calling_ae_title
        log.warning("store.refused", status=f"0x{refusal.status:04X}", reason=refusal.comment, calling_ae_title=title)

    def abandon(self) -> None:
        """Let go of the file; what was not kept is gone."""
        if self._incoming is not None:
            self._incoming.close()
            self._incoming = None

    # -- steps, each of which may fail ----------------------------------------------------------------------

    def _begun(self, begin: Callable[[], Incoming]) -> None:
        if self._associations.is_stopping:
            raise Unavailable("The node is stopping")
        self._incoming = begin()

    def _taken(self, number: int) -> None:
        incoming = self._open_file()
        if incoming.received + number > self._maximum:
            raise Unavailable("Larger than receive.maximum_instance_megabytes")
        incoming.took(number)

    def _kept(self, reply: Reply | None) -> None:
        incoming = self._open_file()
        if not incoming.received:
            raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The C-STORE request has no data set")
        incoming.keep(reply)
        self._opened.bytes += incoming.received
        self._opened.latest = incoming.received

    def _open_file(self) -> Incoming:
        if self._incoming is None:
            raise Unavailable("The association is being closed")
        return self._incoming

    def _try(self, step: Callable[[Argument], None], argument: Argument) -> None:
        try:
            step(argument)
        except InvalidInstance as error:
            self._refusal = Answer(error.status, str(error), error.offending_element)
        except Unavailable as error:
            self._refusal = Answer(Status.OUT_OF_RESOURCES, str(error))
        except Exception as error:  # a defect of ours must not cost the sender its association
            log.exception("store.defect", error=type(error).__name__)
            self._refusal = Answer(Status.PROCESSING_FAILURE, "Internal error")
        if self._refusal is not None:
            self.abandon()
