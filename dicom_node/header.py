"""What the node reads of a dataset while it arrives: enough to keep, group and complete it, nothing more."""

from __future__ import annotations

import math
import re
import zlib
from io import BytesIO
from typing import Any

from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from dicom_node.entities import Header, SlicePlace
from dicom_node.errors import InvalidInstance
from dicom_node.labelling import MANUFACTURER_MODEL_NAME
from dicom_node.services import Status

_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_LENIENT_UID = re.compile(r"[0-9][0-9.]{0,63}")
_PIXEL_DATA_GROUP = 0x7FE0
_UNDEFINED_LENGTH = 0xFFFFFFFF
_DEFLATED = frozenset({DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})  # JPIP
_LARGEST_INTEGER = 2**31 - 1  # what a column of the ledger holds
_MAXIMUM_INFLATED = 64 * 1024 * 1024  # bytes of a deflated dataset that are looked at
_TAGS = [
    0x00080016,  # SOP Class UID
    0x00080018,  # SOP Instance UID
    0x00080060,  # Modality
    0x00081090,  # Manufacturer's Model Name
    0x0020000D,  # Study Instance UID
    0x0020000E,  # Series Instance UID
    0x00200032,  # Image Position (Patient)
    0x00200037,  # Image Orientation (Patient)
    0x00201002,  # Images in Acquisition
    0x00201209,  # Number of Series Related Instances
    0x00280008,  # Number of Frames
    0x00540081,  # Number of Slices
]


def read_header(data: bytes | memoryview, transfer_syntax_uid: str) -> Header:
    """Read the dataset `data` (no file meta information) as far as its pixel data.

    Raises:
        InvalidInstance: with 0xC000 where `data` is no dataset or is cut off, with 0xA900 where one of the
            four UIDs that name an instance is missing or malformed (PS3.4 B.2.3).
    """
    dataset = _parse(data, transfer_syntax_uid)
    return Header(
        sop_class_uid=_uid(dataset, "SOPClassUID"),
        sop_instance_uid=_uid(dataset, "SOPInstanceUID"),
        study_instance_uid=_uid(dataset, "StudyInstanceUID"),
        series_instance_uid=_uid(dataset, "SeriesInstanceUID"),
        modality=_code(_value(dataset, "Modality")),
        number_of_frames=_integer(_value(dataset, "NumberOfFrames")) or 1,
        announced=_announced(dataset),
        place=_place(dataset),
        is_own_result=str(_value(dataset, "ManufacturerModelName") or "") == MANUFACTURER_MODEL_NAME,
    )


def is_valid_uid(text: str) -> bool:
    """Return whether `text` is a UID by PS3.5 Section 9.1; also what makes it safe as a file name."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def _parse(data: bytes | memoryview, transfer_syntax_uid: str) -> Dataset:
    is_whole = True
    if transfer_syntax_uid in _DEFLATED:
        data, is_whole = _inflated(data)
    stream = BytesIO(data)
    size = stream.getbuffer().nbytes
    is_implicit = transfer_syntax_uid == ImplicitVRLittleEndian
    claimed: list[int] = []

    def at_pixel_data(tag: Any, vr: str | None, length: int) -> bool:
        if tag >> 16 < _PIXEL_DATA_GROUP:
            return False
        claimed.append(12 if not is_implicit and vr in EXPLICIT_VR_LENGTH_32 else 8)
        claimed.append(0 if length == _UNDEFINED_LENGTH else length)
        return True

    try:
        dataset = read_dataset(
            stream,
            is_implicit_VR=is_implicit,
            is_little_endian=transfer_syntax_uid != ExplicitVRBigEndian,
            stop_when=at_pixel_data,
            specific_tags=_TAGS,
        )
    except Exception as error:
        # pydicom answers garbage with whatever exception comes first: to us they all mean the same
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set cannot be parsed") from error
    if is_whole and (stream.tell() + sum(claimed) > size or any(map(_is_short, dataset.values()))):
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set is cut off")
    if not dataset:
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set has none of the elements of an instance")
    return dataset


def _is_short(element: Any) -> bool:
    """Return whether an element has fewer bytes than its length says."""
    if not isinstance(element, RawDataElement) or element.length == _UNDEFINED_LENGTH:
        return False
    return element.length > len(element.value or b"")


def _inflated(data: bytes | memoryview) -> tuple[bytes, bool]:
    """Return the beginning of a deflated dataset, and whether that is all of it."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflate.decompress(data, _MAXIMUM_INFLATED)
    except zlib.error as error:
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The deflated data set cannot be inflated") from error
    if not inflate.eof and len(inflated) < _MAXIMUM_INFLATED:
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set is cut off")
    return inflated, inflate.eof


def _value(dataset: Dataset, keyword: str) -> Any:
    """Return the value of `keyword`, or None where it is absent or cannot be read."""
    try:
        return dataset.get(keyword)
    except Exception:  # a malformed value of an element that the node can do without
        return None


def _uid(dataset: Dataset, keyword: str) -> str:
    """Return a UID that names the instance; vendors' leading zeros are let through, path tricks are not."""
    text = str(_value(dataset, keyword) or "").strip("\x00 ")
    if not _LENIENT_UID.fullmatch(text) or ".." in text:
        problem = "missing" if not text else "malformed"
        tag = tag_for_keyword(keyword)
        raise InvalidInstance(Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS, f"{keyword} is {problem}", tag)
    return text


def _code(value: Any) -> str:
    """Return a Code String as the ledger can hold it: whatever a broken sender puts in, at most 16 plain characters."""
    return "".join(letter for letter in str(value or "") if " " <= letter <= "~").strip()[:16]


def _integer(value: Any) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number <= _LARGEST_INTEGER else None


def _announced(dataset: Dataset) -> int | None:
    """Return how many instances the series should have, where a header says so.

    Number of Series Related Instances says it of the series; Number of Slices (PET, NM) and Images in
    Acquisition say it of what usually is the series.
    """
    for keyword in ("NumberOfSeriesRelatedInstances", "NumberOfSlices", "ImagesInAcquisition"):
        number = _integer(_value(dataset, keyword))
        if number is not None and number > 1:
            return number
    return None


def _place(dataset: Dataset) -> SlicePlace | None:
    orientation = _value(dataset, "ImageOrientationPatient")
    position = _value(dataset, "ImagePositionPatient")
    try:
        a, b, c, d, e, f = (float(number) for number in orientation)
        x, y, z = (float(number) for number in position)
    except (TypeError, ValueError):
        return None
    if not all(map(math.isfinite, (a, b, c, d, e, f, x, y, z))):
        return None
    return SlicePlace((a, b, c, d, e, f), (x, y, z))
