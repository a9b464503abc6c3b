"""A source image as a person sees it: its grey scale, its proportions, which side is which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi

from dicom_node.errors import ResultRefused
from dicom_node.source import Source

Rgb = npt.NDArray[np.uint8]
"""Shape `(rows, columns, 3)`."""

_DARKEST, _BRIGHTEST = 1.0, 99.5  # percentiles that become black and white where the images state no window
_LETTERS = (("R", "L"), ("A", "P"), ("F", "H"))  # along x, y, z of the patient: towards less, towards more
_OBLIQUE = 0.25  # a direction cosine under this is not worth a letter


@dataclass(frozen=True, slots=True)
class Window:
    """A window in rescaled units (PS3.3 C.11.2.1.2)."""

    centre: float
    width: float


def is_colour(header: Dataset) -> bool:
    """Return whether an image is in colour."""
    return int(header.get("SamplesPerPixel") or 1) == 3 or header.get("PhotometricInterpretation") == "PALETTE COLOR"


def rendered(source: Source, frame: int, window: Window | None = None) -> Rgb:
    """Return a frame as it is meant to be seen: modality LUT, window, polarity (PS3.4 N.2); colour as it is.

    Raises:
        ResultRefused: the source has no pixels at hand.
    """
    stored, header = _stored(source, frame), source.header_of(frame)
    if stored.ndim == 3:
        return np.ascontiguousarray(stored.astype(np.uint8))
    rescaled = apply_modality_lut(stored, header).astype(np.float32)
    if window is None and header.get("VOILUTSequence"):
        grey = _stretched(apply_voi(rescaled.astype(np.int64), header, index=0).astype(np.float32))
    else:
        grey = _windowed(rescaled, window or stated_window(header) or _percentiles(rescaled))
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def window_of(source: Source, frame: int) -> Window:
    """Return the window that a frame states, else one that shows what is in it."""
    header = source.header_of(frame)
    return stated_window(header) or _percentiles(apply_modality_lut(_stored(source, frame), header).astype(np.float32))


def stated_window(header: Dataset) -> Window | None:
    """Return the first window of a flat header."""
    try:
        centre, width = _first(header.WindowCenter), _first(header.WindowWidth)
    except (AttributeError, TypeError, ValueError, IndexError):
        return None
    return Window(centre, width) if width >= 1 else None


def aspect(header: Dataset) -> float:
    """Return how much taller than wide a pixel is (PS3.3 C.7.6.3.1.7, 10.7.1.1)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        value = header.get(keyword)
        if value and len(value) == 2 and float(value[0]) > 0 and float(value[1]) > 0:
            return float(value[0]) / float(value[1])
    return 1.0


def edges(header: Dataset) -> tuple[str, str, str, str]:
    """Return what is at the left, right, top and bottom edge of an image: letters such as R, AL; "" if unknown."""
    orientation = header.get("ImageOrientationPatient")
    if orientation:
        row = _direction([float(value) for value in list(orientation)[:3]])
        column = _direction([float(value) for value in list(orientation)[3:]])
    else:
        stated = [str(value) for value in header.get("PatientOrientation") or ()]
        row, column = stated if len(stated) == 2 else ("", "")
    return _opposite(row), row, _opposite(column), column


def _direction(cosines: list[float]) -> str:
    named = sorted(zip(cosines, _LETTERS, strict=True), key=lambda pair: -abs(pair[0]))
    return "".join(letters[value > 0] for value, letters in named if abs(value) > _OBLIQUE)[:2]


def _opposite(letters: str) -> str:
    other = {one: two for pair in _LETTERS for one, two in (pair, pair[::-1])}
    return "".join(other.get(letter, "") for letter in letters)


def _stored(source: Source, frame: int) -> npt.NDArray[Any]:
    if source.pixels is None:
        raise ResultRefused("a picture of the images needs their pixels, and the source gives none")
    return source.pixels(frame)


def _windowed(values: npt.NDArray[np.float32], window: Window) -> npt.NDArray[np.float32]:
    """Apply a linear window (PS3.3 C.11.2.1.2.1); the result is 0..255."""
    width = max(window.width - 1.0, 1.0)
    return np.asarray(np.clip(((values - (window.centre - 0.5)) / width + 0.5) * 255, 0, 255))


def _stretched(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    low, high = float(values.min()), float(values.max())
    return np.asarray((values - low) / max(high - low, 1.0) * 255)


def _percentiles(values: npt.NDArray[np.float32]) -> Window:
    low, high = np.percentile(values, [_DARKEST, _BRIGHTEST])
    return Window(float(low + high) / 2, max(float(high - low), 1.0))


def _first(value: Any) -> float:
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)
