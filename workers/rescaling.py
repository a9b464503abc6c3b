"""Stored pixels become a modality's values: slope and intercept, padding, and short ways for uncompressed images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset

from dicom_node.decoders import meaning_of_words
from workers.plain import Headers
from workers.slices import Slice

_AIR = -1024  # HU; also what lies outside a CT's reconstruction circle
_WORD = 16  # bits

Array = npt.NDArray[Any]


def scaled(
    stored: Array, piece: Slice, header: Dataset, dtype: np.dtype[Any], factor: float
) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """Return the values of stored pixels as `dtype`, times `factor`."""
    values = _rescaled(stored, piece, header, dtype)
    if factor != 1.0:
        values *= factor
    return values


def _rescaled(
    stored: Array, piece: Slice, header: Dataset, dtype: npt.DTypeLike
) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """Apply Modality LUT slope and intercept (PS3.3 C.11.1); what a CT never measured becomes air."""
    values = stored.astype(np.float32) * piece.slope + piece.intercept
    if header.get("Modality") == "CT":
        if "PixelPaddingValue" in header:
            values[_is_padding(stored, header)] = _AIR
        np.maximum(values, _AIR, out=values)
    if np.issubdtype(np.dtype(dtype), np.integer):
        np.clip(values, -32768, 32767, out=values)
    return values.astype(dtype)


def _is_padding(stored: Array, header: Dataset) -> npt.NDArray[np.bool_]:
    """Return where pixels are padding: one value or, with a limit, all between the two (PS3.3 C.7.5.1.1.2)."""
    first, last = sorted(
        (int(header.PixelPaddingValue), int(header.get("PixelPaddingRangeLimit", header.PixelPaddingValue)))
    )
    return np.asarray((stored >= first) & (stored <= last))


@dataclass(frozen=True, slots=True)
class Steps:
    """What most CT and MR images ask for, in steps on whole arrays: the stored bits, a lowest value, an intercept.

    To look each word up in a table makes an index of 8 bytes of it first: loading took a third more processor time.
    """

    unused: int  # bits of a word above those that are stored
    is_signed: bool
    lowest: int  # of stored values: what is below becomes what it becomes
    intercept: int

    def __call__(self, words: npt.NDArray[np.uint16], into: npt.NDArray[np.int16]) -> None:
        """Write the values of `words` to `into`, of the same shape."""
        stored: Array = words.view(np.int16)
        if self.unused and self.is_signed:
            stored = np.right_shift(np.left_shift(stored, self.unused), self.unused)
        elif self.unused:
            stored = np.bitwise_and(stored, (1 << _WORD - self.unused) - 1)
        np.maximum(stored, self.lowest, out=into)
        np.add(into, self.intercept, out=into)


@dataclass(frozen=True, slots=True)
class Meaning:
    """What each word of uncompressed pixel data becomes."""

    table: Array  # by word, little-endian and unsigned
    steps: Steps | None  # to the same, for every word

    def write(self, words: npt.NDArray[np.unsignedinteger], into: Array) -> None:
        """Write the values of `words` to `into`, of the same shape."""
        if self.steps is None:
            into[...] = self.table.take(words)
        else:
            self.steps(words, into)


class Meanings:
    """What each word of pixel data becomes in a volume, for the images that say the same of it."""

    def __init__(self, headers: Headers, dtype: np.dtype[Any]) -> None:
        """Make values of `dtype`."""
        self._headers = headers
        self._dtype = dtype
        self._made: dict[tuple[int, float], Meaning | None] = {}

    def of(self, piece: Slice, factor: float) -> Meaning | None:
        """Return it, made by the steps that values without a table take; None where there is none."""
        header = self._headers.shared(piece.instance)
        key = (id(header), factor)
        if key not in self._made:
            try:
                table = scaled(meaning_of_words(header), piece, header, self._dtype, factor)
                self._made[key] = Meaning(table, _steps(table, piece, header))
            except Exception:
                # whatever it is that pydicom does not like, it will say so of the image itself
                self._made[key] = None
        return self._made[key]


def _steps(table: Array, piece: Slice, header: Dataset) -> Steps | None:
    """Return the steps that give what a table gives, for every word there is; None where these do not."""
    if table.dtype != np.int16 or len(table) != 1 << _WORD or piece.slope != 1.0:
        return None
    intercept, words = int(piece.intercept), np.arange(1 << _WORD, dtype="<u2")
    lowest = int(table.min()) - intercept
    least, most = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    if not words.dtype.isnative or not all(least <= number <= most for number in (lowest, intercept)):
        return None
    steps = Steps(_WORD - int(header.BitsStored), bool(header.PixelRepresentation), lowest, intercept)
    made = np.empty_like(table)
    steps(words, made)
    return steps if np.array_equal(made, table) else None
