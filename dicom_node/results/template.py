"""Sequences as bytes: of items that differ in a few values only, one is encoded and the others are filled in."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple, TypeAlias

from pydicom import DataElement, Dataset
from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.tag import Tag

_ITEM = b"\xfe\xff\x00\xe0"
_ENCODING = "ISO_IR 192"
_SHORT_TEXT = {
    **dict.fromkeys(("AE", "AS", "CS", "DA", "DT", "TM", "UI"), "latin-1"),
    **dict.fromkeys(("LO", "LT", "SH", "ST"), "utf-8"),
}
_LONG_TEXT = {"UC": "utf-8", "UR": "latin-1", "UT": "utf-8"}
_LONGEST_SHORT = 0xFFFE


class _Value(NamedTuple):
    """An element of a short VR whose value differs: its tag and VR as bytes, and its keyword."""

    head: bytes
    keyword: str


class _Nested(NamedTuple):
    """A sequence or an item of a length that differs: what stands before its length, and what is in it."""

    head: bytes
    parts: tuple[_Part, ...]


_Part: TypeAlias = bytes | _Value | _Nested


class Template:
    """An item in Explicit VR Little Endian with places for the values that differ; every length is defined."""

    def __init__(self, item: Dataset, varying: Collection[str]) -> None:
        """Take everything of `item` but the values of the elements `varying`, keywords, at any depth."""
        self._parts = (_Nested(_ITEM, _parts(item, varying)),)
        self._keywords = list(_keywords(self._parts))
        self._between: dict[tuple[int, ...], tuple[bytes, ...]] = {}

    def filled(self, values: Mapping[str, bytes]) -> bytes:
        """Return the item as bytes; `values` are by keyword, as they are written, of an even length.

        What stands between the values is the same for all that are of the same lengths.
        """
        wanted = [values[keyword] for keyword in self._keywords]
        lengths = tuple(map(len, wanted))
        if lengths not in self._between:
            self._between[lengths] = tuple(_between(self._parts, values))
        first, *others = self._between[lengths]
        return b"".join([first, *chain.from_iterable(zip(wanted, others, strict=True))])


def sequence(keyword: str, items: Iterable[bytes]) -> RawDataElement:
    """Return encoded items as an element that a dataset writes as it is, and parses where it is asked for."""
    value = b"".join(items)
    return RawDataElement(Tag(keyword), "SQ", len(value), value, 0, False, True)


def encode_items(dataset: Dataset, keyword: str) -> None:
    """Replace a sequence by its items as bytes, as pydicom would write them, which it does in five times the time."""
    if keyword in dataset:
        dataset[keyword] = sequence(keyword, (_item(each) for each in dataset[keyword].value))


def leave_encoded(dataset: Dataset) -> None:
    """Let a dataset be written without parsing its encoded sequences again; its VRs must all be certain by now."""
    stated = dataset.get("SpecificCharacterSet")
    dataset.set_original_encoding(False, True, convert_encodings(stated) if stated else default_encoding)


def text(value: str, padding: bytes = b" ") -> bytes:
    """Return text of the default repertoire as it is written; a UID is padded with a null (PS3.5 9.1)."""
    encoded = value.encode("ascii")
    return encoded + padding * (len(encoded) % 2)


def uid(value: str) -> bytes:
    """Return a UID as it is written."""
    return text(str(value), b"\0")


def _item(item: Dataset) -> bytes:
    content = b"".join(encoded(element) for element in item)
    return _ITEM + struct.pack("<L", len(content)) + content


def encoded(element: DataElement) -> bytes:
    """Return an element in Explicit VR Little Endian: sequences and plain text here, everything else by pydicom."""
    vr, value = str(element.VR), element.value
    if vr == "SQ":
        content = b"".join(_item(each) for each in value)
        return head_of(element) + b"\0\0" + struct.pack("<L", len(content)) + content
    if isinstance(value, str) and (encoding := _SHORT_TEXT.get(vr)):
        content = _padded(value.encode(encoding), vr)
        if len(content) <= _LONGEST_SHORT:
            return head_of(element) + struct.pack("<H", len(content)) + content
    if isinstance(value, str) and (encoding := _LONG_TEXT.get(vr)):
        content = _padded(value.encode(encoding), vr)
        return head_of(element) + b"\0\0" + struct.pack("<L", len(content)) + content
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_data_element(buffer, element, _ENCODING)
    return buffer.getvalue()


def head_of(element: DataElement | RawDataElement) -> bytes:
    """Return an element's tag and VR as they are written."""
    return struct.pack("<HH", element.tag.group, element.tag.element) + str(element.VR).encode()


def _padded(content: bytes, vr: str) -> bytes:
    return content + (b"\0" if vr == "UI" else b" ") * (len(content) % 2)


def _parts(item: Dataset, varying: Collection[str]) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    for element in item:
        head = head_of(element)
        if element.keyword in varying:
            parts.append(_Value(head, element.keyword))
        elif element.VR == "SQ":
            items = tuple(_Nested(_ITEM, _parts(each, varying)) for each in element.value)
            parts.append(_Nested(head + b"\0\0", items))
        else:
            parts.append(encoded(element))
    return tuple(parts)


def _keywords(parts: tuple[_Part, ...]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, _Value):
            yield part.keyword
        elif isinstance(part, _Nested):
            yield from _keywords(part.parts)


def _between(parts: tuple[_Part, ...], values: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield what stands before the first value, between each two, and after the last."""
    before = b""
    for part in parts:
        if isinstance(part, bytes):
            before += part
        elif isinstance(part, _Value):
            yield before + part.head + struct.pack("<H", len(values[part.keyword]))
            before = b""
        else:
            within = list(_between(part.parts, values))
            size = sum(map(len, within)) + sum(len(values[keyword]) for keyword in _keywords(part.parts))
            before += part.head + struct.pack("<L", size)
            for piece in within[:-1]:
                yield before + piece
                before = b""
            before += within[-1]
    yield before
