"""What an association proposes is understood, negotiated and answered once: a device proposes the same, each time.

pynetdicom makes objects of every one of the hundreds of items in which many a sender proposes 128 presentation
contexts, and of those of the answer; that takes as long as to receive ten slices of CT.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from copy import copy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from pynetdicom import dul, evt, fsm
from pynetdicom.acse import ACSE
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, UserIdentityNegotiation
from pynetdicom.presentation import PresentationContext

_ITEMS_AT = 74  # bytes of an A-ASSOCIATE-RQ before its items (PS3.8 Table 9-11)
_MOST = 64  # proposals that are known
_LONGEST = 1 << 15  # bytes of one; 128 contexts with three syntaxes each have 17,000
_MOST_ANSWERS = 8  # remembered for each: one for each port that listens, and each name that is called or calls

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a proposal was accepted; nobody changes it."""

    supported: Any  # the contexts that were there to accept it
    accepted: dict[int, PresentationContext]
    rejected: list[PresentationContext]
    primitive: A_ASSOCIATE


class Contexts(list[PresentationContext]):
    """Presentation contexts as they were proposed, and what was answered; nobody changes them."""

    def __init__(self, proposed: list[PresentationContext]) -> None:
        """Keep what was proposed."""
        super().__init__(proposed)
        self._answers: dict[tuple[str, str, int], Answer] = {}

    def answer(self, calling: str, called: str, supported: Any) -> Answer | None:
        """Return what was answered to `calling`, by the one that is `called`, where `supported` are."""
        return self._answers.get((calling, called, id(supported)))  # which stays its own: the answer has it

    def keep(self, calling: str, called: str, answer: Answer) -> None:
        """Answer the same the next time."""
        if len(self._answers) >= _MOST_ANSWERS:
            self._answers.clear()
        self._answers[calling, called, id(answer.supported)] = answer


class Lately(Generic[Key, Value]):
    """What is known of what came lately; what has not come for long is forgotten."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return of how many something is known."""
        return len(self._known)

    def get(self, key: Key) -> Value | None:
        """Return what is known, if anything is."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def keep(self, key: Key, value: Value) -> None:
        """Know this from now on."""
        with self._lock:
            self._known[key] = value
            if len(self._known) > _MOST:
                self._known.popitem(last=False)


_understood: Lately[bytes, A_ASSOCIATE] = Lately()  # by the items of an A-ASSOCIATE-RQ


class Request(A_ASSOCIATE_RQ):
    """An A-ASSOCIATE-RQ whose items may be known."""

    pdu_type = 0x01  # which pynetdicom looks up by class

    def decode(self, bytestream: bytes) -> None:
        """Decode as pynetdicom does, up to the items where they are known."""
        self._items = bytestream[_ITEMS_AT:]
        self._meaning = _understood.get(self._items)
        super().decode(bytestream if self._meaning is None else bytestream[:_ITEMS_AT])

    def to_primitive(self) -> A_ASSOCIATE:
        """Return what is asked for."""
        if self._meaning is None:
            self._meaning = super().to_primitive()
            if len(self._items) <= _LONGEST and not _says_who(self._meaning):
                contexts = Contexts(self._meaning.presentation_context_definition_list)
                self._meaning._presentation_context_definition_list = contexts
                _understood.keep(self._items, self._meaning)
        primitive = copy(self._meaning)
        primitive.calling_ae_title, primitive.called_ae_title = self.calling_ae_title, self.called_ae_title
        return primitive


def _says_who(request: A_ASSOCIATE) -> bool:
    """Return whether a request names its user, perhaps with a passcode: that is nothing to keep."""
    return any(isinstance(item, UserIdentityNegotiation) for item in request.user_information)


class Negotiation(ACSE):
    """Answers a proposal, and answers it again as it did before.

    What pynetdicom would look at then (names that are wanted, how many associations there are) `scp` has judged.
    """

    def _negotiate_as_acceptor(self) -> None:
        association, request = self.assoc, cast(A_ASSOCIATE, self.requestor.primitive)
        proposed, supported = request.presentation_context_definition_list, self.acceptor.supported_contexts
        names = str(request.calling_ae_title), str(request.called_ae_title)
        known = proposed.answer(*names, supported) if isinstance(proposed, Contexts) else None
        if known is not None:
            self._accept_again(known, names[0])
            return
        super()._negotiate_as_acceptor()
        answer = self.acceptor.primitive
        if isinstance(proposed, Contexts) and answer is not None and answer.result == 0:
            accepted, rejected = association._accepted_cx, association._rejected_cx
            proposed.keep(*names, Answer(supported, dict(accepted), list(rejected), answer))

    def _accept_again(self, known: Answer, calling_ae_title: str) -> None:
        """Do what pynetdicom does once it knows what to answer."""
        association = self.assoc
        self.requestor.ae_title = calling_ae_title
        association._accepted_cx, association._rejected_cx = dict(known.accepted), list(known.rejected)
        self.acceptor.primitive = known.primitive
        self.dul.send_pdu(known.primitive)
        evt.trigger(association, evt.EVT_ACCEPTED, {})
        association.is_established = True
        evt.trigger(association, evt.EVT_ESTABLISHED, {})


def acceptance(primitive: A_ASSOCIATE) -> A_ASSOCIATE_AC:
    """Return the A-ASSOCIATE-AC that says it; its bytes are made once."""
    said = vars(primitive).get("said")
    if said is None:
        said = vars(primitive)["said"] = A_ASSOCIATE_AC(primitive).encode()
    made: Any = A_ASSOCIATE_AC()
    made.encode = lambda: said
    return cast(A_ASSOCIATE_AC, made)


def amend() -> None:
    """Have pynetdicom remember what is proposed to this process, and what it answered."""
    dul._PDU_TYPES[b"\x01"] = (Request, "Evt6")
    cast(Any, fsm).A_ASSOCIATE_AC = acceptance
