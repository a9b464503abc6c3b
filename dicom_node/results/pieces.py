"""A result as a Part 10 file, piece by piece: what is large in it is never put together in memory."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase, BytesIO
from typing import Any

from pydicom import DataElement, Dataset
from pydicom.dataelem import RawDataElement
from pydicom.uid import UID

from dicom_node.results.template import encoded, head_of, leave_encoded

_LARGE = 1 << 20  # bytes of an element that is written by itself
_UNDEFINED_LENGTH = 0xFFFFFFFF
_SEQUENCE_END = b"\xfe\xff\xdd\xe0" + bytes(4)


class Pixels(BufferedIOBase):
    """Pixel data that is made anew, frame by frame, whenever it is read; pydicom writes it as it does a file."""

    def __init__(self, make: Callable[[], Iterable[bytes]], length: int) -> None:
        """Take what makes the pieces, of `length` bytes all told."""
        self._make = make
        self._length = length
        self._at = 0  # where the next reader reads
        self._made = 0  # how far `_rest` has come
        self._rest: Iterator[bytes] = iter(())
        self._left = b""

    def __len__(self) -> int:
        """Return how many bytes there are."""
        return self._length

    def pieces(self) -> Iterator[bytes]:
        """Yield all of it, whatever has been read."""
        yield from self._make()

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position; nothing is made before it is read."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """Return so many bytes, fewer only at the end; a position that was passed means beginning again."""
        end = self._length if size is None or size < 0 else min(self._at + size, self._length)
        if end <= self._at:
            return b""
        if self._at < self._made or not self._made:
            self._rest, self._left, self._made = iter(self._make()), b"", 0
        taken: list[bytes] = []
        while self._made < end:
            piece = self._left or next(self._rest, b"")
            if not piece:
                break
            here = piece[: end - self._made]
            self._left = piece[len(here) :]
            skipped = max(0, self._at - self._made)
            self._made += len(here)
            taken.append(here[skipped:])
        self._at = max(self._at, self._made)
        return b"".join(taken)


def pieces(dataset: Dataset) -> Iterator[bytes | memoryview]:
    """Yield an object as a file; the pixels that `Pixels` makes, and other large elements, one after the other."""
    first = min((element.tag for element in dataset.elements() if _is_large(element)), default=_UNDEFINED_LENGTH)
    yield _beginning(dataset, first)
    for element in sorted((each for each in dataset.elements() if each.tag >= first), key=lambda each: each.tag):
        value: Any = element.value
        if isinstance(value, Pixels):
            yield from _pixels(element, value, dataset.file_meta.TransferSyntaxUID)
        elif _is_large(element):
            yield head_of(element) + b"\0\0" + struct.pack("<L", len(value))
            yield value
        else:
            yield encoded(dataset[element.tag])


def _is_large(element: Any) -> bool:
    is_encoded = element.is_raw and str(element.VR) == "SQ"
    return isinstance(element.value, Pixels) or (is_encoded and len(element.value) > _LARGE)


def _beginning(dataset: Dataset, end: int) -> memoryview:
    """Return a file up to the element `end`."""
    beginning = Dataset()
    beginning.update({element.tag: element for element in dataset.elements() if element.tag < end})
    beginning.file_meta = dataset.file_meta
    if dataset.original_encoding == (False, True):
        leave_encoded(beginning)
    buffer = BytesIO()
    beginning.save_as(buffer, enforce_file_format=True)
    return buffer.getbuffer()


def _pixels(element: DataElement | RawDataElement, made: Pixels, syntax: UID) -> Iterator[bytes]:
    length = _UNDEFINED_LENGTH if syntax.is_encapsulated else len(made)
    yield head_of(element) + b"\0\0" + struct.pack("<L", length)
    yield from made.pieces()
    if syntax.is_encapsulated:
        yield _SEQUENCE_END
