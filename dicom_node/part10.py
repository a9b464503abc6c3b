"""What stands before a data set in a file (PS3.10 Section 7.1), written so that the file vouches for itself.

The meta information of what the node receives ends with Private Information (0002,0102): the digest of the data set.
A file whose bytes did not all reach the disk before the power failed is known for what it is, without the ledger.

Zeros before the digest make what stands before a data set as long whatever its names are and, where the data set has
the length that was expected, the file end where a block does. Slices of a series often have the same length, and what
fills blocks goes to the disk in one write past the page cache, for no more room on the disk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from dicom_node import __version__
from dicom_node.digest import SIZE, digesting_like, is_digest
from dicom_node.labelling import derive_uid
from dicom_node.landing import BLOCK

IMPLEMENTATION_CLASS_UID = derive_uid("implementation", "dicom-node")
IMPLEMENTATION_VERSION_NAME = f"DICOM-NODE {__version__}"[:16]

_META_HEAD = 144  # bytes of preamble, prefix and the element that says how long the meta information is
_META_LENGTH = b"DICM" + b"\x02\x00\x00\x00UL\x04\x00"
_BEGINNING = b"\x00" * 128 + _META_LENGTH
_LEAST_LEAD = 640  # bytes before a data set: enough for the longest names there are, and for a digest
_LONGEST_META = 1 << 16
_EARLIER_SIZE = 32  # bytes of the digest in files of earlier versions
_PIECE = 1 << 20


class _Readable(Protocol):
    """A file, or one that is mapped into memory."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """What the meta information says of a received file."""

    transfer_syntax_uid: str
    source_application_entity_title: str
    digest: bytes | None  # of the data set; None in files of earlier versions
    data_set_at: int  # offset, bytes


def preamble(
    sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str, calling_ae_title: str, *, expected: int = 0
) -> bytes:
    """Return everything before the data set; its last bytes are the place of the data set's digest.

    `expected` is how many bytes the data set may have: if it has, the file fills whole blocks.
    """
    before, behind = around(sop_class_uid, transfer_syntax_uid, calling_ae_title)
    elements = before + _uid(0x0003, sop_instance_uid) + behind
    room = max(SIZE, lead_length(expected) - _META_HEAD - len(elements) - 4)
    elements += room.to_bytes(4, "little") + bytes(room)
    return _BEGINNING + len(elements).to_bytes(4, "little") + elements


def lead_length(expected: int) -> int:
    """Return how many bytes stand before a data set, whatever its names are, where it may have `expected` bytes.

    C reads a data set to behind them before Python has looked at its names (`native/message.c`).
    """
    return _LEAST_LEAD + (-(_LEAST_LEAD + expected) % BLOCK & ~1 if expected else 0)


@lru_cache(maxsize=256)
def around(sop_class_uid: str, transfer_syntax_uid: str, calling_ae_title: str) -> tuple[bytes, bytes]:
    """Return the elements before and behind that of the instance, which are the same for every instance of a series.

    The last has no length and no value yet: that ends with the digest.
    """
    before = [_long(0x0001, b"OB", b"\x00\x01"), _uid(0x0002, sop_class_uid)]
    behind = [
        _uid(0x0010, transfer_syntax_uid),
        _uid(0x0012, IMPLEMENTATION_CLASS_UID),
        _short(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME.encode(), b" "),
        _short(0x0016, b"AE", calling_ae_title.encode("ascii", "replace"), b" "),
        _uid(0x0100, IMPLEMENTATION_CLASS_UID),
        _long(0x0102, b"OB", b"")[:-4],
    ]
    return b"".join(before), b"".join(behind)


def vouching(written: bytes, digest: bytes) -> bytes:
    """Return a `preamble` with the digest in its place."""
    return written[:-SIZE] + digest


def read_origin(file: _Readable) -> Origin:
    """Read the meta information of a file that the node received, and leave `file` at its data set.

    Raises ValueError where it is none of the node's.
    """
    start = _data_set_at(file)
    if start > _LONGEST_META:
        raise ValueError("meta information of an impossible length")
    file.seek(_META_HEAD)
    values = dict(_elements(file.read(start - _META_HEAD)))
    digest = values.get(0x0102)
    if digest is not None and len(digest) != _EARLIER_SIZE:
        digest = digest[-SIZE:]
    return Origin(
        values.get(0x0010, b"").rstrip(b"\x00").decode("ascii", "replace"),
        values.get(0x0016, b"").decode("ascii", "replace").strip(),
        digest if digest is not None and is_digest(digest) else None,
        start,
    )


def has_head(file: _Readable) -> bool:
    """Return whether a file begins as one that the node received does, once it is whole."""
    return file.read(_META_HEAD)[128:140] == _META_LENGTH


def dataset_digest(file: _Readable, like: str) -> str:
    """Return the digest (hex) of the data set of a Part 10 file, of the kind that `like` is (PS3.10 Section 7.1).

    Raises ValueError where the file has no meta information of a known length, which every file of the node has, and
    where `like` is no digest.
    """
    digest = digesting_like(like)
    file.seek(_data_set_at(file))
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _data_set_at(file: _Readable) -> int:
    head = file.read(_META_HEAD)
    if len(head) < _META_HEAD or head[128:140] != _META_LENGTH:
        raise ValueError("no file meta information")
    return _META_HEAD + int.from_bytes(head[140:144], "little")


def _elements(meta: bytes) -> list[tuple[int, bytes]]:
    """Return `(element, value)` of the meta information, as `preamble` writes it."""
    found, at = [], 0
    while at + 8 <= len(meta):
        _, element, vr, length = struct.unpack_from("<HH2sH", meta, at)
        at += 8
        if vr == b"OB":
            if at + 4 > len(meta):
                raise ValueError("meta information that is cut off")
            (length,) = struct.unpack_from("<I", meta, at)
            at += 4
        found.append((element, meta[at : at + length]))
        at += length
    return found


def _short(element: int, vr: bytes, value: bytes, padding: bytes) -> bytes:
    value += padding * (len(value) % 2)
    return struct.pack("<HH2sH", 0x0002, element, vr, len(value)) + value


def _uid(element: int, uid: str) -> bytes:
    return _short(element, b"UI", uid.encode("ascii", "replace"), b"\x00")


def _long(element: int, vr: bytes, value: bytes) -> bytes:
    return struct.pack("<HH2sHI", 0x0002, element, vr, 0, len(value)) + value
