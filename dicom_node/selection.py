"""Which series a model takes, by what their headers say: does it suit, and which of several is best?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydicom import Dataset

from dicom_node.findings import Reason
from dicom_node.manifest import InputSlot
from dicom_node.services import modality_term

_SHARP = 1.0
_MEDIUM = 0.5
_SOFT = 0.0
_KERNELS: tuple[tuple[str, float], ...] = (
    # reconstruction kernels by vendor: how sharp; the first pattern that the whole name matches
    (r"(STANDARD|SOFT|SMOOTH).*", _SOFT),  # GE
    (r"(DETAIL|CHEST).*", _MEDIUM),
    (r"(LUNG|BONE|BONEPLUS|EDGE|ULTRA|HD LUNG).*", _SHARP),
    (r"[A-Z]{1,2}[0-3]\d[a-z]?.*", _SOFT),  # Siemens: B30f, Br36, J30s, I31f
    (r"[A-Z]{1,2}4\d[a-z]?.*", _MEDIUM),
    (r"[A-Z]{1,2}[5-9]\d[a-z]?.*", _SHARP),
    (r"(A|B|IPV|IMR1|SA|SB).*", _SOFT),  # Philips
    (r"(C|SC)", _MEDIUM),
    (r"(D|E|L|Y[A-D]|U[A-D]|LUNG).*", _SHARP),
    (r"FC(0\d|1\d|2\d|4\d).*", _SOFT),  # Canon, Toshiba
    (r"FC(3\d|5\d|8\d).*", _SHARP),
)


def objections(header: Dataset, slot: InputSlot) -> Iterator[tuple[Reason, str]]:
    """Yield why a series is not what a slot asks for, as far as one of its headers says.

    Values of elements are not quoted: they may be a patient's. `header` is flat (see `source.flat`).
    """
    modality = str(header.get("Modality") or "")
    if modality not in slot.modality:
        yield Reason.WRONG_MODALITY, f"{modality_term(modality) or 'none'}, made for {', '.join(slot.modality)}"
    body_part = str(header.get("BodyPartExamined") or "").strip().upper()
    if slot.body_part and body_part and body_part not in slot.body_part:
        yield Reason.WRONG_BODY_PART, f"another one, made for {', '.join(slot.body_part)}"
    yield from stack_objections(header, slot)
    contrast = "with" if header.get("ContrastBolusAgent") or header.get("ContrastBolusAgentSequence") else "without"
    if slot.contrast not in ("any", contrast):
        yield Reason.WRONG_CONTRAST, f"{contrast} contrast agent, made for series {slot.contrast} it"


def stack_objections(header: Dataset, slot: InputSlot) -> Iterator[tuple[Reason, str]]:
    """Yield what of a header may differ between the acquisitions of one series, and is not what a slot asks for."""
    stated = [value.upper() for keyword in ("ImageType", "FrameType") for value in _values(header.get(keyword))]
    if unwanted := set(stated) & {word.upper() for word in slot.image_type_excludes}:
        yield Reason.WRONG_IMAGE_TYPE, ", ".join(sorted(unwanted))
    if lacking := {word.upper() for word in slot.image_type} - set(stated):
        yield Reason.WRONG_IMAGE_TYPE, f"not {', '.join(sorted(lacking))}"
    for keyword, pattern in slot.when.items():
        if not any(re.fullmatch(pattern, value, re.IGNORECASE) for value in _values(header.get(keyword))):
            yield Reason.WRONG_HEADER, f"{keyword} is not {pattern!r}"


def _values(value: Any) -> list[str]:
    if value is None or value == "":
        return [""]
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return [str(value)]
    return [str(one) for one in value] or [""]


# -- the best of several ------------------------------------------------------------------------------------------


def rank(header: Dataset, slices: int, slot: InputSlot) -> tuple[float, ...]:
    """Return what to compare candidates for a slot by, the best being the least, in the order of `slot.prefer`."""
    return tuple(_PREFERENCES[preference](header, slices) for preference in slot.prefer)


def sharpness(kernel: str) -> float:
    """Return how sharp a reconstruction kernel is, 0 (soft) to 1, by its vendor's name for it; 0.5 where unknown."""
    return next((value for pattern, value in _KERNELS if re.fullmatch(pattern, kernel, re.IGNORECASE)), _MEDIUM)


def _thickness(header: Dataset, slices: int) -> float:
    return _number(header.get("SliceThickness")) or _number(header.get("SpacingBetweenSlices")) or float("inf")


def _kernel(header: Dataset, slices: int) -> float:
    return sharpness(_values(header.get("ConvolutionKernel"))[0])


def _fewness(header: Dataset, slices: int) -> float:
    return -float(slices)


def _age(header: Dataset, slices: int) -> float:
    moment = f"{header.get('AcquisitionDate') or header.get('SeriesDate') or ''}" + (
        f"{header.get('AcquisitionTime') or header.get('SeriesTime') or ''}"[:6].ljust(6, "0")
    )
    return -_number(moment)


def _number(value: Any) -> float:
    try:
        return float(str(value)) if value not in (None, "") else 0.0
    except ValueError:
        return 0.0


_PREFERENCES: Mapping[str, Callable[[Dataset, int], float]] = {
    "thinnest": _thickness,
    "soft_kernel": _kernel,
    "most_slices": _fewness,
    "newest": _age,
}
