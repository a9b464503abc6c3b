"""Damages compressed frames and has them decoded as a worker would, in a process of its own: a crash ends it.

`python -m tests.fuzz.frames JPEG2000Lossless 10000 [SEED]` says how many were decoded, and how many refused.
"""

from __future__ import annotations

import random
import sys
import warnings

import imagecodecs
import numpy as np
from pydicom import Dataset
from pydicom import uid as uids
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID

from dicom_node.decoders import require_plausible_frame, values_of
from dicom_node.errors import InputRefused
from tests.datasets import ct

_SHAPE = (40, 56)
_START = 2  # bytes that every decoder looks at first
_HEADS = (40, 120)  # bytes in which most of what can go wrong stands
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def originals(syntax: UID) -> list[bytes]:
    """Return frames as they should be, of several kinds."""
    chance = np.random.default_rng(0)
    smooth = np.cumsum(chance.integers(0, 9, _SHAPE), axis=1).astype(np.uint16)
    pictures = (smooth, chance.integers(0, 65536, _SHAPE).astype(np.uint16))
    if syntax in (uids.JPEG2000Lossless, uids.JPEG2000):
        made = [
            imagecodecs.jpeg2k_encode(each, codecformat="J2K", level=level) for each in pictures for level in (0, 50)
        ]
    elif syntax == uids.JPEGLSLossless:
        made = [imagecodecs.jpegls_encode(each, level=level) for each in pictures for level in (0, 3)]
    else:
        made = [
            imagecodecs.jpeg8_encode(each, lossless=True, predictor=number, bitspersample=16)
            for each in pictures
            for number in (1, 4, 7)
        ]
    return [bytes(each) for each in made]


def damaged(frame: bytes, chance: random.Random) -> bytes:
    """Return a frame of which some bytes are others, or the end is lost."""
    data = bytearray(frame)
    reach = min(len(data), chance.choice((*_HEADS, len(data))))
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        data[chance.randrange(_START, reach)] = chance.choice((*_INTERESTING, chance.randrange(256)))
    if chance.random() < 0.3:
        del data[chance.randrange(_START, len(data)) :]
    return bytes(data)


def described(syntax: UID) -> Dataset:
    """Return the header of the image that the frames are of."""
    header = ct(1)
    header.Rows, header.Columns = _SHAPE
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    return header


def main(name: str, count: int, seed: int = 0) -> None:
    """Decode so many damaged frames."""
    warnings.simplefilter("ignore")  # a frame may happen to be as long as its pixels
    syntax, chance = UID(getattr(uids, name)), random.Random(seed)
    header, frames = described(syntax), originals(syntax)
    said = {"decoded": 0, "not decoded": 0, "refused": 0}
    for frame in frames:
        assert values_of([frame], header) is not None
    for _ in range(count):
        frame = damaged(chance.choice(frames), chance)
        try:
            require_plausible_frame(frame, header)
            values = values_of([frame], header)
        except InputRefused:
            said["refused"] += 1
            continue
        assert values is None or values[0].shape == _SHAPE
        said["not decoded" if values is None else "decoded"] += 1
    print(" ".join(f"{number} {what}" for what, number in said.items()))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
