"""Frames in run lengths (PS3.5 Annex G) as words: bytes may say what they like, nothing is read beyond them."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from dicom_node.elements import NotUnderstood

MOST_EXPANDED = 64
"""Bytes that one byte of a frame stands for, at most: half of a run."""

_HEAD = 64  # bytes: the number of segments, and where each begins
_TOGETHER = 1 << 15  # bytes of a segment that are looked at together: a run of 128 has two
_NOTHING = 128  # says the header byte of nothing; after a lower one bytes follow as they are, after a higher repeats
_STEPS = bytes(header + 2 if header < _NOTHING else 1 + (header > _NOTHING) for header in range(256))


def unpacked(frame: bytes, pixels: int, size: int) -> npt.NDArray[np.unsignedinteger]:
    """Return the words of a frame of one sample, `size` bytes each (1 or 2), of shape `(pixels,)`.

    Raises:
        NotUnderstood: the frame has not as many segments as its words have bytes, or one of them ends too early.
    """
    if len(frame) < _HEAD:
        raise NotUnderstood("a frame in run lengths has no head")
    number, *starts = struct.unpack_from(f"<{1 + size}L", frame)
    if number != size or not _HEAD <= starts[0] <= starts[-1] <= len(frame):
        raise NotUnderstood("a frame in run lengths has other segments than its image")
    words = np.empty((pixels, size), np.uint8)
    for byte, (start, end) in enumerate(zip(starts, [*starts[1:], len(frame)], strict=True), start=1):
        _unpack(frame[start:end], words[:, -byte])  # the high bytes come first
    return words.reshape(-1).view(f"<u{size}")


def _unpack(segment: bytes, to: npt.NDArray[np.uint8]) -> None:
    """Fill `to` with what a segment stands for: some of it at a time, and not what is beyond."""
    expanded = _by_bytes if len(segment) < len(to) // 2 else _by_pieces
    filled = at = 0
    while filled < len(to) and at < len(segment):
        part, at = expanded(segment, at)
        part = part[: len(to) - filled]
        to[filled : filled + len(part)] = part
        filled += len(part)
    if filled < len(to):
        raise NotUnderstood("a segment of run lengths ends too early")


def _by_bytes(segment: bytes, start: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Return what a part of a segment stands for, from the header byte at `start` on, and where the next part begins.

    Each byte is there so many times: a header never, what follows one once, what repeats as often as its header says.
    """
    headers: list[int] = []
    at, end, steps = start, min(start + _TOGETHER, len(segment)), _STEPS
    note = headers.append  # every name is looked up some thousand times in each frame
    while at < end:
        note(at - start)
        at += steps[segment[at]]
    part, places = np.frombuffer(segment[start:at], np.uint8), np.array(headers)
    times = np.ones(at - start, np.intp)
    times[places] = 0
    repeats = places[part[places] > _NOTHING]
    times[repeats + 1] = 257 - part[repeats].astype(np.intp)
    return np.repeat(part, times[: len(part)]), at  # the last bytes may be missing


def _by_pieces(segment: bytes, start: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Return the same, quicker where most bytes follow one another as they are: noise."""
    pieces: list[bytes] = []
    at, end = start, min(start + _TOGETHER, len(segment))
    note = pieces.append
    while at < end:
        header = segment[at]
        if header < _NOTHING:
            after = at + 2 + header
            note(segment[at + 1 : after])
            at = after
        elif header > _NOTHING:
            note(segment[at + 1 : at + 2] * (257 - header))
            at += 2
        else:
            at += 1
    return np.frombuffer(b"".join(pieces), np.uint8), at
