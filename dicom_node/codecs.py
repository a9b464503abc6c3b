"""Grey frames in JPEG 2000, JPEG-LS and lossless JPEG, decoded by imagecodecs: other threads run meanwhile.

pydicom's other decoders keep the interpreter's lock, and take up to four times as long. This is one more of its
decoding plugins: what surrounds a frame, the signs of its values and what they are stored in stay pydicom's. Of
imagecodecs only those are used that damaged frames did not crash (`tests/fuzz/frames.py`): OpenJPEG, CharLS and
libjpeg-turbo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

PLUGIN = "imagecodecs"
_END_OF_IMAGE = b"\xff\xd9"
_PADDING = b"\0"  # after the end, to an even length


def has_end(frame: bytes) -> bool:
    """Return whether a frame of JPEG or JPEG-LS ends as it should."""
    return frame.rstrip(_PADDING).endswith(_END_OF_IMAGE)


def _jpeg_2000(frame: bytes) -> npt.NDArray[Any]:
    return np.asarray(imagecodecs.jpeg2k_decode(frame))


def _jpeg_ls(frame: bytes) -> npt.NDArray[Any]:
    return np.asarray(imagecodecs.jpegls_decode(frame))


def _lossless_jpeg(frame: bytes) -> npt.NDArray[Any]:
    if not has_end(frame):  # libjpeg makes up what is missing
        raise ValueError("the frame ends too early")
    return np.asarray(imagecodecs.jpeg8_decode(frame))


_DECODE: Mapping[UID, Callable[[bytes], npt.NDArray[Any]]] = {
    JPEG2000Lossless: _jpeg_2000,
    JPEG2000: _jpeg_2000,
    HTJ2KLossless: _jpeg_2000,
    HTJ2KLosslessRPCL: _jpeg_2000,
    HTJ2K: _jpeg_2000,
    JPEGLSLossless: _jpeg_ls,
    JPEGLSNearLossless: _jpeg_ls,
    JPEGLossless: _lossless_jpeg,
    JPEGLosslessSV1: _lossless_jpeg,
}
DECODER_DEPENDENCIES = {syntax: (PLUGIN,) for syntax in _DECODE}  # pydicom asks for this, and for `is_available`


def is_available(uid: str) -> bool:
    """Return whether frames of a transfer syntax are decoded here."""
    return uid in _DECODE


def decodes(transfer_syntax_uid: str, samples_per_pixel: int) -> bool:
    """Return whether an image's frames are decoded here: those of colour are not."""
    return samples_per_pixel == 1 and is_available(transfer_syntax_uid)


def decode_frame(frame: bytes, runner: DecodeRunner) -> bytes:
    """Return the decoded frame, and tell `runner` in how many bits its values are (pydicom's plugins for decoding).

    Raises:
        ValueError: it is none of the image that the header describes.
        Exception: what imagecodecs raises.
    """
    values = _DECODE[runner.transfer_syntax](frame)
    if values.shape != (runner.rows, runner.columns):
        raise ValueError("the frame is of another size than its image")
    runner.set_option("bits_allocated", values.dtype.itemsize * 8)
    return values.tobytes()


for _syntax in _DECODE:
    get_decoder(_syntax).add_plugin(PLUGIN, (__name__, "decode_frame"))
