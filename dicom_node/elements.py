"""Where the elements of a data set lie in its bytes, found without making anything of them (PS3.5 Section 7)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, auto
from functools import lru_cache, partial
from typing import NamedTuple

from dicom_node import native

PIXEL_DATA = 0x7FE00010
UNDEFINED_LENGTH = 0xFFFFFFFF

_SHORT = ("AE", "AS", "AT", "CS", "DA", "DS", "DT", "FD", "FL", "IS", "LO", "LT", "PN", "SH", "SL", "SS", "ST", "TM")
_LONG = ("OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV")
EXPLICIT_HEADS: Mapping[bytes, int] = {
    **{vr.encode(): 8 for vr in (*_SHORT, "UI", "UL", "US")},
    **{vr.encode(): 12 for vr in _LONG},
}
"""By VR, how many bytes stand before a value: tag, VR and a short or a long length (PS3.5 7.1.2)."""

ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD  # PS3.5 7.5
_MOST_ELEMENTS = 1_000_000  # at the top level; an image has some hundred
_MOST_INSIDE = 10_000_000  # items and elements in one sequence of undefined length; 20,000 frames have a third of it
_DEEPEST = 200_000  # sequences and items that are open at once
_DELIMITERS = 0xFFFE  # their group

implicit_head = struct.Struct("<HHL").unpack_from
explicit_head = struct.Struct("<HH2sH").unpack_from
read_long = struct.Struct("<L").unpack_from

Bytes = bytes | bytearray | memoryview


wanted_by_c = lru_cache(maxsize=64)(native.Wanted)  # what is asked for are constants


class NotUnderstood(ValueError):
    """The bytes are no data set, or one that needs a reader with more patience."""


class CutOff(NotUnderstood):
    """The bytes end before the data set does."""


class Place(NamedTuple):
    """Where a value lies: its VR ("" where it is implicit), the offset of its first byte, its length in bytes."""

    vr: str
    offset: int
    length: int


_place: Callable[[tuple[str, int, int]], Place] = partial(tuple.__new__, Place)  # Place._make, and no call in Python


def scan(
    view: Bytes, is_implicit: bool, wanted: frozenset[int], stop_at: int = PIXEL_DATA, *, is_whole: bool = True
) -> dict[int, Place]:
    """Return where the `wanted` top-level elements of a little-endian data set without meta information lie, in order.

    The scan ends with the first tag that is `stop_at` or above, whose value need not lie in `view` and whose
    length may be UNDEFINED_LENGTH, and before the first above all that are wanted. Of other elements of undefined
    length the place is that of their items. `is_whole` False says that `view` is but the beginning.

    Raises:
        CutOff: an element before the end of the scan is not all there.
        NotUnderstood: tags do not ascend, a VR does not exist, an item is where none can be, or there is more of
            everything than an object can mean.
    """
    if (places := wanted_by_c(wanted).scan(view, is_implicit, stop_at, is_whole=is_whole)) is not None:
        return {tag: _place(where) for tag, where in places}
    found: dict[int, Place] = {}
    last, before, at, end = max(wanted, default=-1), -1, 0, len(view)
    if is_implicit and bytes(view[4:6]) in EXPLICIT_HEADS:
        raise NotUnderstood("the data set has VRs, and is said to have none")
    heads, long_length = EXPLICIT_HEADS, read_long  # every name is looked up some hundred times in each instance
    try:
        for _ in range(_MOST_ELEMENTS):
            if at >= end:
                break
            if is_implicit:
                group, element, length = implicit_head(view, at)
                vr, at = b"", at + 8
            else:
                group, element, vr, length = explicit_head(view, at)
                size = heads.get(vr, 0)
                if size == 12:
                    length = long_length(view, at + 8)[0]
                elif not size:
                    raise NotUnderstood(f"the element {group:04X}{element:04X} has no VR")
                at += size
            tag = group << 16 | element
            if tag <= before or group == _DELIMITERS:
                raise NotUnderstood(f"the tag {tag:08X} is out of order")
            if tag > last:
                return found
            if tag >= stop_at:
                if tag in wanted:
                    found[tag] = Place(vr.decode(), at, length)
                return found
            before, start = tag, at
            if length == UNDEFINED_LENGTH:
                at = _after_items(view, at, vr, is_implicit)
                length = at - start - 8
            else:
                at += length
            if at > end:
                raise CutOff("the data set is cut off")
            if tag in wanted:
                found[tag] = Place(vr.decode(), start, length)
        else:
            raise NotUnderstood("a data set with so many elements is no object")
    except struct.error:
        raise CutOff("the data set is cut off") from None
    if not is_whole:
        raise CutOff("the data set goes on")
    return found


def items(view: Bytes, place: Place, is_implicit: bool) -> Iterator[Bytes]:
    """Yield the bytes of each item of the sequence at a place that `scan` has found; raise NotUnderstood as it does."""
    if place.vr not in ("", "SQ", "UN"):
        raise NotUnderstood(f"an element of VR {place.vr} has no items")
    contents = _contents(place.vr.encode() or b"SQ", is_implicit)
    at, end = place.offset, min(place.offset + place.length, len(view))
    try:
        while at < end:
            tag, _, length, start = _head(view, at, True)
            if tag != ITEM:
                raise NotUnderstood("a sequence has something else than items")
            if length == UNDEFINED_LENGTH:
                at = _after(view, start, [(False, contents)])
                length = at - start - 8
            else:
                at = start + length
            if at > end:
                raise CutOff("a sequence is cut off")
            yield view[start : start + length]
    except struct.error:
        raise CutOff("a sequence is cut off") from None


def _head(view: Bytes, at: int, is_implicit: bool) -> tuple[int, bytes, int, int]:
    """Return the tag, VR and length of the element at an offset, and the offset of its value."""
    if is_implicit:
        group, element, length = implicit_head(view, at)
        return group << 16 | element, b"", length, at + 8
    group, element, vr, length = explicit_head(view, at)
    size = EXPLICIT_HEADS.get(vr, 0)
    if size == 8:
        return group << 16 | element, vr, length, at + 8
    if not size:
        raise NotUnderstood(f"the element {group:04X}{element:04X} has no VR")
    return group << 16 | element, vr, read_long(view, at + 8)[0], at + 12


class _Contents(Enum):
    """What the items of a sequence are made of."""

    EXPLICIT = auto()
    IMPLICIT = auto()
    BYTES = auto()


_OF_VR = {b"SQ": _Contents.EXPLICIT, b"UN": _Contents.IMPLICIT, b"OB": _Contents.BYTES, b"OW": _Contents.BYTES}


def _contents(vr: bytes, is_implicit: bool) -> _Contents:
    """Return what a value of undefined length is made of; one of UN has no VRs, whatever is around it (PS3.5 6.2.2)."""
    if is_implicit:
        return _Contents.IMPLICIT
    if vr not in _OF_VR:
        raise NotUnderstood(f"an element of VR {vr.decode()} has no length")
    return _OF_VR[vr]


def _after_items(view: Bytes, at: int, vr: bytes, is_implicit: bool) -> int:
    """Return where a value of undefined length ends, its delimitation item included."""
    return _after(view, at, [(True, _contents(vr, is_implicit))])


def _after(view: Bytes, at: int, opened: list[tuple[bool, _Contents]]) -> int:
    """Return where the last of the sequences, and items in them, that are open is closed.

    What is open is in a list, not in calls: however deep they are, sequences cost no more than their bytes.
    """
    for _ in range(_MOST_INSIDE):
        if not opened or len(opened) > _DEEPEST:
            break
        is_sequence, contents = opened[-1]
        if is_sequence or view[at : at + 2] == b"\xfe\xff":
            tag, _, length, at = _head(view, at, True)
            if tag == (SEQUENCE_END if is_sequence else ITEM_END) and length == 0:
                opened.pop()
                continue
            if tag != ITEM or not is_sequence or (contents is _Contents.BYTES and length == UNDEFINED_LENGTH):
                raise NotUnderstood("a sequence has something else than items")
            inside = (False, contents)
        else:
            _, vr, length, at = _head(view, at, contents is _Contents.IMPLICIT)
            inside = (True, contents)
            if length == UNDEFINED_LENGTH:
                inside = (True, _contents(vr, contents is _Contents.IMPLICIT))
        if length == UNDEFINED_LENGTH:
            opened.append(inside)
        else:
            at += length
    if opened:
        raise NotUnderstood("a sequence with so much in it is none of an object")
    if at > len(view):
        raise CutOff("a sequence is cut off")
    return at
