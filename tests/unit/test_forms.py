from __future__ import annotations

import pytest

from dicom_node.forms import UNSEGMENTED, Form, Offer, Wish, choose, forms_to_make
from dicom_node.services import LABEL_MAP_SEGMENTATION as LABELMAP
from dicom_node.services import SEGMENTATION as BINARY

SR, GSPS, SC = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("88.34", "11.1", "7"))
BITS, MAPS = Wish(("seg", "sr")), Wish(("seg", "sr"), "LABELMAP")


def offers(*forms: Form, others: tuple[str, ...] = ()) -> list[Offer]:
    made = []
    for form in forms:
        if form.segmentation_type:
            made.append(Offer("seg", form.key, form.sop_class_uid))
        made.append(Offer("sr", form.key, SR))
    return made + [Offer(kind, None, {"gsps": GSPS, "sc": SC}[kind]) for kind in others]


@pytest.mark.parametrize(
    ("wish", "takes", "expected"),
    [
        (BITS, {}, [Form(), UNSEGMENTED]),
        (BITS, {BINARY: True}, [Form()]),
        (BITS, {BINARY: False}, [UNSEGMENTED]),
        (MAPS, {}, [Form("LABELMAP"), Form(), UNSEGMENTED]),
        (MAPS, {LABELMAP: True}, [Form("LABELMAP")]),
        (MAPS, {LABELMAP: False, BINARY: True}, [Form()]),
        (Wish(("sr", "sc")), {BINARY: True}, [UNSEGMENTED]),
        (Wish(("seg",), "BINARY", 400), {BINARY: True}, [Form("BINARY", 400)]),
    ],
)
def test_forms_are_made_down_to_the_first_that_is_sure(wish, takes, expected):
    assert list(forms_to_make(wish, takes)) == expected


def sent(wish, offered, accepted):
    choice = choose(wish, offered, accepted)
    return [(offered[n].kind, offered[n].form) for n in choice.chosen], choice.replaced, choice.lost


def test_what_is_wished_and_taken_is_sent_with_the_report_that_refers_to_it():
    offered = offers(Form("LABELMAP"), Form(), UNSEGMENTED)

    assert sent(MAPS, offered, {LABELMAP, BINARY, SR}) == ([("seg", "LABELMAP"), ("sr", "LABELMAP")], (), ())
    assert sent(MAPS, offered, {BINARY, SR}) == (
        [("seg", ""), ("sr", "")],
        ("seg: BINARY instead of LABELMAP",),
        (),
    )


def test_a_peer_without_segmentations_gets_a_report_that_refers_to_none():
    offered = offers(Form(), UNSEGMENTED)

    assert sent(BITS, offered, {SR}) == ([("sr", "NONE")], ("seg: sr instead",), ())


def test_a_kind_that_nothing_replaces_is_lost_and_said_to_be():
    assert sent(BITS, offers(Form(), UNSEGMENTED), {BINARY})[2] == ("sr",)
    assert sent(Wish(("sr", "sc")), offers(UNSEGMENTED, others=("sc",)), {SC}) == (
        [("sc", None)],
        ("sr: sc instead",),
        (),
    )


def test_a_kind_that_is_not_on_the_list_is_never_sent():
    offered = offers(Form(), UNSEGMENTED, others=("gsps", "sc"))

    assert sent(Wish(("gsps",)), offered, {BINARY, SR, GSPS, SC})[0] == [("gsps", None)]
