"""Sequences whose items differ in a few values only: one item is encoded, the others are filled in, as bytes."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from pydicom import Dataset
from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import RawDataElement
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.tag import Tag

_ITEM = b"\xfe\xff\x00\xe0"
_ENCODING = "ISO_IR 192"


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

    def filled(self, values: Mapping[str, bytes]) -> bytes:
        """Return the item as bytes; `values` are by keyword, as they are written, of an even length."""
        return _joined(self._parts, values)


def sequence(keyword: str, items: Iterable[bytes]) -> RawDataElement:
    """Return encoded items as an element that a dataset writes as it is, and parses where it is asked for."""
    value = b"".join(items)
    return RawDataElement(Tag(keyword), "SQ", len(value), value, 0, False, True)


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


def _parts(item: Dataset, varying: Collection[str]) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    for element in item:
        head = struct.pack("<HH", element.tag.group, element.tag.element) + element.VR.encode()
        if element.keyword in varying:
            parts.append(_Value(head, element.keyword))
        elif element.VR == "SQ":
            items = tuple(_Nested(_ITEM, _parts(each, varying)) for each in element.value)
            parts.append(_Nested(head + b"\0\0", items))
        else:
            buffer = DicomBytesIO()
            buffer.is_little_endian, buffer.is_implicit_VR = True, False
            write_data_element(buffer, element, _ENCODING)
            parts.append(buffer.getvalue())
    return tuple(parts)


def _joined(parts: tuple[_Part, ...], values: Mapping[str, bytes]) -> bytes:
    made: list[bytes] = []
    for part in parts:
        if isinstance(part, bytes):
            made.append(part)
        elif isinstance(part, _Value):
            value = values[part.keyword]
            made += (part.head, struct.pack("<H", len(value)), value)
        else:
            content = _joined(part.parts, values)
            made += (part.head, struct.pack("<L", len(content)), content)
    return b"".join(made)
