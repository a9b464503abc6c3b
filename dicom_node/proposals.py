"""What an association proposes is understood, negotiated and answered once: a device proposes the same, each time.

pynetdicom makes objects of every one of the hundreds of items in which many a sender proposes 128 presentation
contexts, and of those of the answer; that takes as long as to receive ten slices of CT.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from copy import copy
from typing import Any, Generic, TypeVar, cast

from pynetdicom import acse, dul, fsm, presentation
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_items import PDUItem
from pynetdicom.pdu_primitives import A_ASSOCIATE, UserIdentityNegotiation

_ITEMS_AT = 74  # bytes of an A-ASSOCIATE-RQ before its items (PS3.8 Table 9-11)
_MOST = 64  # proposals, and answers, that are known
_LONGEST = 1 << 15  # bytes of one; 128 contexts with three syntaxes each have 17,000
_MOST_ANSWERS = 8  # remembered for each: one for each port that listens

Key = TypeVar("Key")
Value = TypeVar("Value")
Answer = tuple[list[Any], list[Any]]
Negotiate = Callable[..., Answer]


class Contexts(list[Any]):
    """Presentation contexts as they were proposed, and what was answered; nobody changes them."""

    def __init__(self, proposed: list[Any]) -> None:
        """Keep what was proposed."""
        super().__init__(proposed)
        self._answers: dict[tuple[Negotiate, int], tuple[Any, Answer]] = {}

    def answered(self, negotiate: Negotiate, supported: Any, roles: Any) -> Answer:
        """Return what `negotiate` answers where `supported` are; `roles` were proposed with these contexts."""
        key = negotiate, id(supported)  # which stays its own: the list is kept
        known = self._answers.get(key)
        if known is None:
            if len(self._answers) >= _MOST_ANSWERS:
                self._answers.clear()
            known = self._answers[key] = supported, negotiate(self, supported, roles)
        contexts, answered_roles = known[1]
        return list(contexts), list(answered_roles)


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
_encoded: Lately[tuple[Any, ...], bytes] = Lately()  # by what is answered


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


def _remembering(negotiate: Negotiate) -> Negotiate:
    def negotiated(rq_contexts: Any, ac_contexts: Any, roles: Any = None) -> Answer:
        if isinstance(rq_contexts, Contexts):
            return rq_contexts.answered(negotiate, ac_contexts, roles)
        return negotiate(rq_contexts, ac_contexts, roles)

    return negotiated


class _Encoded(PDUItem):
    """Items as they are sent."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def encode(self) -> bytes:
        return self._content

    def __len__(self) -> int:
        return len(self._content)


class Acceptance(A_ASSOCIATE_AC):
    """An A-ASSOCIATE-AC, whose presentation contexts may have been encoded before."""

    pdu_type = 0x02

    def from_primitive(self, primitive: A_ASSOCIATE) -> None:
        """Become what answers `primitive`."""
        contexts = primitive.presentation_context_definition_results_list
        key = tuple((context.context_id, context.result, context.transfer_syntax[0]) for context in contexts)
        known = _encoded.get(key)
        if known is None:
            super().from_primitive(primitive)
            _encoded.keep(key, b"".join(item.encode() for item in self.variable_items[1:-1]))
            return
        short = copy(primitive)
        short._presentation_context_definition_results_list = []
        super().from_primitive(short)
        self.variable_items.insert(1, cast(Any, _Encoded(known)))


def amend() -> None:
    """Have pynetdicom remember what is proposed to this process, and what it answered."""
    dul._PDU_TYPES[b"\x01"] = (Request, "Evt6")
    cast(Any, fsm).A_ASSOCIATE_AC = Acceptance
    cast(Any, acse).negotiate_as_acceptor = _remembering(presentation.negotiate_as_acceptor)
    cast(Any, acse).negotiate_unrestricted = _remembering(presentation.negotiate_unrestricted)
