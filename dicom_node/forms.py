"""Which results a peer gets: what its settings wish for, cut down to what it takes. Nothing here acts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from dicom_node.services import LABEL_MAP_SEGMENTATION, RESULT_KINDS, SEGMENTATION

SegmentationType = Literal["BINARY", "LABELMAP"]

DEFAULT_RESULTS = ("seg", "sr")
"""What a peer gets whose settings do not say."""

DEPENDS_ON_FORM = frozenset({"seg", "sr"})
"""Kinds that differ from form to form; all others are the same objects for every peer."""

_INSTEAD = {kind.name: kind.instead for kind in RESULT_KINDS}
_SOP_CLASS: Mapping[SegmentationType, str] = {"BINARY": SEGMENTATION, "LABELMAP": LABEL_MAP_SEGMENTATION}


@dataclass(frozen=True, slots=True)
class Form:
    """How one set of results writes its masks (None: not at all), and so what its reports refer to.

    A segmentation of more than `split_above` frames is written as one object for each structure (0: never).
    """

    segmentation_type: SegmentationType | None = "BINARY"
    split_above: int = 0

    @property
    def sop_class_uid(self) -> str:
        """Return the SOP Class of its segmentations; "" where it has none."""
        return _SOP_CLASS[self.segmentation_type] if self.segmentation_type else ""

    @property
    def key(self) -> str:
        """Return the form's name in the ledger and in UIDs; the plain one's is empty."""
        if self == Form():
            return ""
        return "/".join([self.segmentation_type or "NONE", *([str(self.split_above)] if self.split_above else [])])


UNSEGMENTED = Form(None)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a peer's settings ask for."""

    kinds: tuple[str, ...]
    segmentation_type: SegmentationType = "BINARY"
    split_above: int = 0

    @property
    def forms(self) -> tuple[Form, ...]:
        """Return the forms that would do, the wished one first: masks as bits where label maps are not taken."""
        if "seg" not in self.kinds:
            return (UNSEGMENTED,)
        types = dict.fromkeys((self.segmentation_type, "BINARY"))
        return (*(Form(kind, self.split_above) for kind in types), UNSEGMENTED)


def forms_to_make(wish: Wish, takes: Mapping[str, bool]) -> tuple[Form, ...]:
    """Return the forms to encode for a peer: down to the first that it is known to take.

    `takes` says of SOP Class UIDs whether the peer takes them, as far as it has been asked.
    """
    made = []
    for form in wish.forms:
        taken = takes.get(form.sop_class_uid) if form.sop_class_uid else True
        if taken is not False:
            made.append(form)
        if taken:
            break
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Offer:
    """One encoded object as far as the choice is concerned; `form` is None where it is the same in every form."""

    kind: str
    form: str | None
    sop_class_uid: str


OfferT = TypeVar("OfferT", bound=Offer)


@dataclass(frozen=True, slots=True)
class Choice:
    """What to send, by index into the offers; what replaced what, in words; kinds that nothing replaces."""

    chosen: tuple[int, ...]
    replaced: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


def choose(wish: Wish, offers: Sequence[Offer], accepted: Collection[str]) -> Choice:
    """Return what of the `offers` goes to a peer that accepts these SOP Class UIDs.

    A kind that is not taken is replaced by the next best of the peer's own list, which is sent anyway.
    """
    form = _form(wish, offers, accepted)
    offered = [
        number for number, offer in enumerate(offers) if offer.kind in wish.kinds and offer.form in (None, form.key)
    ]
    wanted = {offers[number].kind for number in offered}
    if form is UNSEGMENTED and "seg" in wish.kinds and wanted:
        wanted.add("seg")  # known not to be taken when the results were made, so there is none to offer
    refused = {offers[number].kind for number in offered if offers[number].sop_class_uid not in accepted}
    sent = {offers[number].kind for number in offered} - refused
    replaced, lost = [], []
    if "seg" in sent and form.segmentation_type != wish.segmentation_type:
        replaced.append(f"seg: {form.segmentation_type} instead of {wish.segmentation_type}")
    for kind in (kind for kind in wish.kinds if kind in wanted - sent):
        instead = next((other for other in _INSTEAD[kind] if other in sent), None)
        (replaced.append(f"{kind}: {instead} instead") if instead else lost.append(kind))
    chosen = tuple(number for number in offered if offers[number].kind in sent)
    return Choice(chosen, tuple(replaced), tuple(lost))


def _form(wish: Wish, offers: Sequence[Offer], accepted: Collection[str]) -> Form:
    """Return the best form that was encoded and whose segmentations are all taken."""
    encoded = {offer.form for offer in offers}
    available = [form for form in wish.forms if form.key in encoded]
    for form in available:
        masks = [offer for offer in offers if offer.kind == "seg" and offer.form == form.key]
        if all(offer.sop_class_uid in accepted for offer in masks):
            return form
    return available[-1] if available else UNSEGMENTED
