"""The items of sequences, at any depth, looked through for a few elements without making anything of the rest.

For the node's own results, which are in Explicit VR Little Endian (PS3.5 A.2); everything else is for pydicom.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Set

from dicom_node.elements import (
    EXPLICIT_HEADS,
    ITEM,
    ITEM_END,
    SEQUENCE_END,
    UNDEFINED_LENGTH,
    Bytes,
    CutOff,
    NotUnderstood,
    explicit_head,
    implicit_head,
    read_long,
)

Found = dict[int, bytes]
"""The elements that were looked for in one item, by tag; of a sequence no more than that it is there."""


def items_of(value: Bytes, wanted: Set[int], passed_over: Set[int] = frozenset()) -> Iterator[list[Found]]:
    """Yield for each item of a sequence what is `wanted` of it, then of every item within it.

    `value` is that of the sequence; what lies in sequences `passed_over` is not looked at.

    Raises:
        NotUnderstood: it is no sequence with VRs, or it is cut off.
    """
    at, end = 0, len(value)
    try:
        while at < end:
            tag, length, at = _delimiter(value, at)
            if tag == SEQUENCE_END:
                return
            found: list[Found] = []
            at = _item(value, at, end, length, wanted, passed_over, found)
            yield found
    except struct.error:
        raise CutOff("a sequence is cut off") from None


def _delimiter(view: Bytes, at: int) -> tuple[int, int, int]:
    """Return the tag and the length of what stands between items, and where it ends."""
    group, element, length = implicit_head(view, at)
    tag = group << 16 | element
    if tag != ITEM and (tag != SEQUENCE_END or length):
        raise NotUnderstood("a sequence has something else than items")
    return tag, length, at + 8


def _item(
    view: Bytes, at: int, end: int, length: int, wanted: Set[int], passed_over: Set[int], found: list[Found]
) -> int:
    """Look through an item that begins at `at`, in a sequence that ends at `end` at the latest; return its end."""
    stop = end if length == UNDEFINED_LENGTH else at + length
    if stop > end:
        raise CutOff("an item is cut off")
    mine: Found = {}
    found.append(mine)
    heads = EXPLICIT_HEADS
    while at < stop:
        group, element, vr, size = explicit_head(view, at)
        tag = group << 16 | element
        if tag == ITEM_END and length == UNDEFINED_LENGTH:
            return at + 8
        wide = heads.get(vr, 0)
        if wide == 12:
            size = read_long(view, at + 8)[0]
        elif not wide:
            raise NotUnderstood(f"the element {tag:08X} has no VR")
        at += wide
        if vr == b"SQ":
            if tag in wanted:
                mine[tag] = b""
            at = _sequence(view, at, stop, size, wanted, passed_over, [] if tag in passed_over else found)
            continue
        if size > stop - at:
            raise CutOff("an element is cut off")
        if tag in wanted:
            mine[tag] = bytes(view[at : at + size])
        at += size
    if length == UNDEFINED_LENGTH:
        raise CutOff("an item has no end")
    return at


def _sequence(
    view: Bytes, at: int, end: int, length: int, wanted: Set[int], passed_over: Set[int], found: list[Found]
) -> int:
    stop = end if length == UNDEFINED_LENGTH else at + length
    if stop > end:
        raise CutOff("a sequence is cut off")
    while at < stop:
        tag, size, at = _delimiter(view, at)
        if tag == SEQUENCE_END:
            return at
        at = _item(view, at, stop, size, wanted, passed_over, found)
    if length == UNDEFINED_LENGTH:
        raise CutOff("a sequence has no end")
    return at
