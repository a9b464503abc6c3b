"""Part 10 files, read with rations: what a file nests, deflates or claims costs no more than what a file can mean.

pydicom makes an object of every item, 24 µs and a kilobyte for eight bytes; it inflates a deflated data set whole, a
thousand bytes for one; and the decoders of compressed pixels make room for as many as the header claims.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, BinaryIO, cast

import structlog
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.filewriter import write_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from dicom_node.errors import InputRefused, NodeError

log = structlog.get_logger()

MAXIMUM_ITEMS = 250_000  # of sequences; 20,000 frames of an enhanced image have as many
_FEW = 1000  # items that nobody has to worry about
_MAXIMUM_READS = 4_000_000  # by pydicom: about two for each element and item
_MAXIMUM_INFLATED = 1 << 28  # bytes of a deflated data set
_ANY_FRAME = 1 << 26  # bytes of a frame that even the smallest file may claim: a blank one compresses to nothing
_ANY_FRAMES = 1 << 30  # of all its frames
_MOST_COMPRESSED = 1000  # beyond these: bytes that one byte of the file may claim
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # the tag of an item, little and big endian
DEFLATED = frozenset({DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})  # JPIP
_PIECE = 1 << 20
_SIZ = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream; in a JP2 file after some boxes
_LONGEST_BOXES = 1 << 16
_START_OF_IMAGE, _START_OF_SCAN = b"\xff\xd8", 0xDA
_FRAME_HEADERS = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}


class Excessive(InputRefused):
    """A file holds more than its reader is given."""


def read(path: Path, *, items: int = MAXIMUM_ITEMS, **options: Any) -> Dataset:
    """Read a Part 10 file as `dcmread(path, **options)` does, with rations; of `items` of sequences, all told.

    Raises:
        OSError: the file cannot be opened.
        Excessive: it has more items, elements or deflated bytes than any image.
        Exception: whatever pydicom answers garbage with.
    """
    with path.open("rb") as file:
        meta, plain = _inflated(file)
        rationed = Rationed(plain, items=items)
        try:
            dataset = dcmread(cast(BinaryIO, rationed), **options)
        except Exception as error:
            rationed.require_not_exceeded()  # pydicom makes another error of one that comes up in a sequence
            if isinstance(error, OSError) and error.errno is None:
                raise InputRefused("the data set ends where an element should begin") from error  # pydicom's, no disk's
            raise
    if meta is not None:
        dataset.file_meta = meta
    dataset.filename, dataset.buffer = str(path), None
    return dataset


def _count(data: bytes) -> int:
    """Return of how many items these bytes can be, at most."""
    return data.count(_ITEMS[0]) + data.count(_ITEMS[1])


class Rationed:
    """A binary file that gives up where its reader asks too often: before many objects are made of few bytes."""

    def __init__(
        self, file: BinaryIO, *, items: int = MAXIMUM_ITEMS, reads: int = _MAXIMUM_READS, size: int | None = None
    ) -> None:
        """Read from `file`, which stays the caller's; of `items`, in so many `reads`, `size` bytes in all."""
        self._file = file
        self._items, self._reads, self._size = items, reads, size
        self._look_ahead_at = items - _FEW
        self.seek, self.tell = file.seek, file.tell
        self.name = getattr(file, "name", None)
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        """Read; raise Excessive where that was once too often."""
        size = size if 0 <= size < _PIECE else self._no_more_than_is_left(size)
        if self._size is not None:
            self._size -= size
            self.require_not_exceeded()
        data = self._file.read(size)
        self._reads -= 1
        self._items -= _count(data)
        if self._items < self._look_ahead_at:
            self._look_ahead()
        self.require_not_exceeded()
        return data

    def _look_ahead(self) -> None:
        """Count what is still to come, once: a bomb is known before it goes off."""
        self._look_ahead_at = -1
        here, left = self._file.tell(), self._items
        while left >= 0 and (piece := self._file.read(_PIECE)):
            left -= _count(piece)
        self._file.seek(here)
        if left < 0:
            self._items = -1

    def require_not_exceeded(self) -> None:
        """Raise Excessive where more was asked for than there was to give."""
        if self._reads < 0 or self._items < 0 or (self._size or 0) < 0:
            raise Excessive("a data set with so many items, elements or bytes of them is no image")

    def _no_more_than_is_left(self, size: int) -> int:
        """Return how much to read where a length claims `size`: room is made before there are bytes to fill it."""
        here = self._file.tell()
        end = self._file.seek(0, 2)
        self._file.seek(here)
        left = max(0, end - here)
        return left if size < 0 else min(size, left)

    def close(self) -> None:
        """Do nothing: the file is the caller's."""


def _inflated(file: BinaryIO) -> tuple[FileMetaDataset | None, BinaryIO]:
    """Return the meta information of a file whose data set is deflated, and the file as it would be if it were not.

    Any other file is returned as it is.
    """
    rationed = cast(BinaryIO, Rationed(file))
    read_preamble(rationed, False)
    meta = _read_file_meta_info(rationed)
    start = file.tell()
    file.seek(0)
    if meta.get("TransferSyntaxUID") not in DEFLATED:
        return None, file
    file.seek(start)
    made = DicomBytesIO()
    made.write(b"\0" * 128 + b"DICM")
    as_if = deepcopy(meta)
    as_if.TransferSyntaxUID = ExplicitVRLittleEndian
    write_file_meta_info(made, as_if)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    most = made.tell() + _MAXIMUM_INFLATED
    piece = file.read(_PIECE)
    while piece and not inflate.eof:
        made.write(inflate.decompress(piece, _PIECE))
        piece = inflate.unconsumed_tail or file.read(_PIECE)
        if made.tell() > most:
            raise Excessive(f"the deflated data set has more than {_MAXIMUM_INFLATED >> 20} MB")
    made.seek(0)
    return meta, cast(BinaryIO, made)


@contextmanager
def understood() -> Iterator[None]:
    """Refuse, in the block, what the libraries answer garbage with: whatever exception comes first.

    Raises:
        InputRefused: in place of anything that is not an error of the node's own, of the disk's or of the memory's.
    """
    try:
        yield
    except (NodeError, OSError, MemoryError):
        raise
    except Exception as error:
        log.warning("input.not_understood", exc_info=error)
        raise InputRefused(f"the images' headers cannot be understood: {type(error).__name__}") from error


def require_plausible(header: Dataset, size: int) -> None:
    """Raise InputRefused where a header claims more pixels than a file of `size` bytes can hold, however compressed."""
    try:
        rows, columns, frames = (int(header.get(keyword) or 0) for keyword in ("Rows", "Columns", "NumberOfFrames"))
        bits = int(header.get("BitsAllocated") or 8) * int(header.get("SamplesPerPixel") or 1)
    except Exception as error:
        # pydicom converts on access, with an exception of its own for each kind of garbage
        raise InputRefused(f"the header's description of its pixels cannot be read: {type(error).__name__}") from error
    frame, frames = rows * columns * bits // 8, max(frames, 1)
    most = _MOST_COMPRESSED * size
    if frames > size or frame > max(_ANY_FRAME, most) or frame * frames > max(_ANY_FRAMES, most):
        raise InputRefused(
            f"{frames} frames of {rows} x {columns} pixels are more than a file of {size} bytes can hold"
        )


def require_no_larger(frame: bytes, pixels: int) -> None:
    """Raise InputRefused where a compressed frame says itself that it has more than so many pixels.

    JPEG and JPEG-LS say it in their frame header (ISO 10918-1 B.2.2), JPEG 2000 in SIZ (ISO 15444-1 A.5.1).
    """
    rows, columns = _size_of(frame)
    if rows * columns > pixels:
        raise InputRefused(f"a compressed frame of {rows} x {columns} pixels is larger than its image")


def _size_of(frame: bytes) -> tuple[int, int]:
    """Return rows and columns of a JPEG frame of any kind; (0, 0) where it does not say."""
    at = frame.find(_SIZ, 0, _LONGEST_BOXES)
    if at >= 0 and len(frame) >= at + 24:
        right, lower, left, upper = struct.unpack_from(">4I", frame, at + 8)
        return max(0, lower - upper), max(0, right - left)
    at, rows, columns = frame.find(_START_OF_IMAGE, 0, 2) + 2, 0, 0
    while at >= 2 and at + 9 <= len(frame) and frame[at] == 0xFF and frame[at + 1] != _START_OF_SCAN:
        if frame[at + 1] in _FRAME_HEADERS:
            there = struct.unpack_from(">HH", frame, at + 5)
            rows, columns = max(rows, there[0]), max(columns, there[1])
        at += 1 if frame[at + 1] == 0xFF else 2 + max(2, int.from_bytes(frame[at + 2 : at + 4], "big"))
    return rows, columns
