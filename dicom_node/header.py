"""What the node reads of a dataset while it arrives: enough to keep, group and complete it, nothing more."""

from __future__ import annotations

import math
import re
import struct
import threading
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple, cast

from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

from dicom_node.elements import UNDEFINED_LENGTH, Bytes, NotUnderstood, Place, scan, wanted_by_c
from dicom_node.entities import Header, SlicePlace
from dicom_node.errors import InvalidInstance
from dicom_node.labelling import MANUFACTURER_MODEL_NAME
from dicom_node.rations import Rationed
from dicom_node.services import Status

_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+")
_LENIENT_UID = re.compile(r"[0-9][0-9.]{0,63}")
_DEFLATED = frozenset({DeflatedExplicitVRLittleEndian, "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})  # JPIP
_LARGEST_INTEGER = 2**31 - 1  # what a column of the ledger holds
_MAXIMUM_INFLATED = 64 * 1024 * 1024  # bytes of a deflated dataset that are looked at
_LONGEST_VALUE = 1024  # bytes of a value that is wanted; what is longer is none of them
_PARSED_ITEMS, _PARSED_READS, _PARSED_BYTES = 50_000, 300_000, 1 << 26  # what pydicom may make objects of, and read
_making = threading.RLock()  # whatever many senders send, objects and inflated bytes are those of one data set
_PIECE = 1 << 20
_FOUND = struct.Struct("=LL")
_PIXEL_DATA_GROUP = 0x7FE00000
_SOP_CLASS_UID, _SOP_INSTANCE_UID, _MODALITY, _MANUFACTURER_MODEL_NAME = 0x00080016, 0x00080018, 0x00080060, 0x00081090
_STUDY_INSTANCE_UID, _SERIES_INSTANCE_UID = 0x0020000D, 0x0020000E
_IMAGE_POSITION_PATIENT, _IMAGE_ORIENTATION_PATIENT = 0x00200032, 0x00200037
_IMAGES_IN_ACQUISITION, _NUMBER_OF_SERIES_RELATED_INSTANCES = 0x00201002, 0x00201209
_NUMBER_OF_FRAMES, _NUMBER_OF_SLICES = 0x00280008, 0x00540081
_TAGS = [
    _SOP_CLASS_UID,
    _SOP_INSTANCE_UID,
    _MODALITY,
    _MANUFACTURER_MODEL_NAME,
    _STUDY_INSTANCE_UID,
    _SERIES_INSTANCE_UID,
    _IMAGE_POSITION_PATIENT,
    _IMAGE_ORIENTATION_PATIENT,
    _IMAGES_IN_ACQUISITION,
    _NUMBER_OF_SERIES_RELATED_INSTANCES,
    _NUMBER_OF_FRAMES,
    _NUMBER_OF_SLICES,
]
_ALIKE = [tag for tag in _TAGS if tag not in (_SOP_INSTANCE_UID, _IMAGE_POSITION_PATIENT)]
_WANTED = frozenset({*_TAGS, *range(_PIXEL_DATA_GROUP, 0x7FE00011)})
WANTED = wanted_by_c(_WANTED)
_PARSED = frozenset({*_TAGS, 0x00080005})  # pydicom reads Specific Character Set in any case
_KEYWORDS = {
    _SOP_CLASS_UID: "SOPClassUID",
    _SOP_INSTANCE_UID: "SOPInstanceUID",
    _STUDY_INSTANCE_UID: "StudyInstanceUID",
    _SERIES_INSTANCE_UID: "SeriesInstanceUID",
}
Values = Mapping[int, bytes]
"""The values of elements, by tag, as they are encoded; `_NUMBER_OF_SLICES` little-endian, the rest is text."""


def read_header(data: Bytes, transfer_syntax_uid: str) -> Header:
    """Read the dataset `data` (no file meta information) as far as its pixel data.

    Raises:
        InvalidInstance: with 0xC000 where `data` is no dataset or is cut off, with 0xA900 where one of the
            four UIDs that name an instance is missing or malformed (PS3.4 B.2.3).
    """
    return _header(_read(data, transfer_syntax_uid))


def read_beginning(data: Bytes, transfer_syntax_uid: str) -> tuple[Header, int] | None:
    """Read what stands before the pixel data in the beginning of a dataset; return it, and how long the whole must be.

    None where the beginning does not say: `read_header` of the whole does. Raises InvalidInstance as that does.
    """
    if not is_plain(transfer_syntax_uid):
        return None
    try:
        places = scan(data, transfer_syntax_uid == ImplicitVRLittleEndian, _WANTED, _PIXEL_DATA_GROUP, is_whole=False)
    except NotUnderstood:
        return None
    if not places:
        return None
    last, pixel_data = places.popitem()
    if last < _PIXEL_DATA_GROUP:
        return None
    end = pixel_data.offset + (0 if pixel_data.length == UNDEFINED_LENGTH else pixel_data.length)
    return _header(_values(bytes(data[: pixel_data.offset]), places)), end


def is_plain(transfer_syntax_uid: str) -> bool:
    """Return whether elements lie in a data set as the scan reads them."""
    return transfer_syntax_uid not in _DEFLATED and transfer_syntax_uid != ExplicitVRBigEndian


def header_of(elements: bytes) -> Header:
    """Return the header of a data set in which C has found these elements: each its tag, its length and its value."""
    values, at, end = {}, 0, len(elements)
    while at < end:
        tag, length = _FOUND.unpack_from(elements, at)
        at += 8
        values[tag] = elements[at : at + min(length, _LONGEST_VALUE)]
        at += length
    return _header(values)


def _header(values: Values) -> Header:
    if not values:
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set has none of the elements of an instance")
    alike = _alike(tuple([values.get(tag, b"") for tag in _ALIKE]))
    return Header(
        sop_class_uid=alike.sop_class_uid,
        sop_instance_uid=_uid(_SOP_INSTANCE_UID, values.get(_SOP_INSTANCE_UID, b"")),
        study_instance_uid=alike.study_instance_uid,
        series_instance_uid=alike.series_instance_uid,
        modality=alike.modality,
        number_of_frames=alike.number_of_frames,
        announced=alike.announced,
        place=_place(alike.orientation, values.get(_IMAGE_POSITION_PATIENT, b"")),
        is_own_result=alike.is_own_result,
    )


def is_valid_uid(text: str) -> bool:
    """Return whether `text` is a UID by PS3.5 Section 9.1; also what makes it safe as a file name."""
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def _read(data: Bytes, transfer_syntax_uid: str) -> Values:
    """Return the values of the elements that are wanted; raise InvalidInstance where the data is cut off."""
    if transfer_syntax_uid in _DEFLATED:
        with _making:
            return _understood(*_inflated(data), transfer_syntax_uid)
    return _understood(data, True, transfer_syntax_uid)


def _understood(data: Bytes, is_whole: bool, transfer_syntax_uid: str) -> Values:
    if transfer_syntax_uid != ExplicitVRBigEndian:
        try:
            return _scanned(data, transfer_syntax_uid == ImplicitVRLittleEndian, is_whole)
        except NotUnderstood:
            pass  # pydicom forgives more, and says what is wrong
    return _parsed(data, transfer_syntax_uid, is_whole)


def _scanned(data: Bytes, is_implicit: bool, is_whole: bool) -> Values:
    places = scan(data, is_implicit, _WANTED, _PIXEL_DATA_GROUP, is_whole=is_whole)
    for tag, (_, offset, length) in places.items():
        if tag >= _PIXEL_DATA_GROUP and length != UNDEFINED_LENGTH and is_whole and offset + length > len(data):
            raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set is cut off")
    return _values(data, places)


def _values(data: Bytes, places: Mapping[int, Place]) -> Values:
    return {
        tag: bytes(data[offset : offset + min(length, _LONGEST_VALUE)])
        for tag, (_, offset, length) in places.items()
        if tag < _PIXEL_DATA_GROUP
    }


def _parsed(data: Bytes, transfer_syntax_uid: str, is_whole: bool) -> Values:
    """Read with pydicom: big endian, and whatever is a little broken."""
    stream = _Stream(data)
    is_implicit = transfer_syntax_uid == ImplicitVRLittleEndian
    is_little_endian = transfer_syntax_uid != ExplicitVRBigEndian
    claimed: list[int] = []

    def at_pixel_data(tag: Any, vr: str | None, length: int) -> bool:
        if tag < _PIXEL_DATA_GROUP:
            return False
        claimed.append(12 if not is_implicit and vr in EXPLICIT_VR_LENGTH_32 else 8)
        claimed.append(0 if length == UNDEFINED_LENGTH else length)
        return True

    rationed = Rationed(cast(BinaryIO, stream), items=_PARSED_ITEMS, reads=_PARSED_READS, size=_PARSED_BYTES)
    try:
        with _making:
            dataset = read_dataset(
                cast(BinaryIO, rationed),
                is_implicit_VR=is_implicit,
                is_little_endian=is_little_endian,
                stop_when=at_pixel_data,
                specific_tags=_TAGS,
            )
            elements = [dataset.get_item(tag) for tag in dataset.keys() if tag in _PARSED]  # noqa: SIM118 - itself it gives values
            del dataset  # and the sequences in it, while nobody else makes any
        rationed.require_not_exceeded()  # pydicom takes what comes up in a sequence for its end
    except Exception as error:
        # pydicom answers garbage with whatever exception comes first: to us they all mean the same
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set cannot be parsed") from error
    if is_whole and (stream.tell() + sum(claimed) > len(data) or any(map(_is_short, elements))):
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set is cut off")
    values = {
        int(element.tag): (element.value or b"")[:_LONGEST_VALUE]
        for element in elements
        if isinstance(element, RawDataElement) and isinstance(element.value, bytes | None)
    }
    if not is_little_endian and _NUMBER_OF_SLICES in values:
        values[_NUMBER_OF_SLICES] = values[_NUMBER_OF_SLICES][::-1]
    return values


class _Stream:
    """What pydicom reads from: bytes that are not copied."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._at + size
        piece = bytes(self._data[self._at : end])
        self._at += len(piece)
        return piece

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        return self._at

    def tell(self) -> int:
        return self._at


def _is_short(element: Any) -> bool:
    """Return whether an element has fewer bytes than its length says."""
    if not isinstance(element, RawDataElement) or element.length == UNDEFINED_LENGTH:
        return False
    return element.length > len(element.value or b"")


def _inflated(data: Bytes) -> tuple[bytearray, bool]:
    """Return the beginning of a deflated dataset, and whether that is all of it."""
    inflate, inflated = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    try:
        for at in range(0, len(data), _PIECE):  # in pieces: zlib copies what it has not come to
            inflated += inflate.decompress(data[at : at + _PIECE], _MAXIMUM_INFLATED - len(inflated))
            if inflate.eof or len(inflated) >= _MAXIMUM_INFLATED:
                return inflated, inflate.eof
    except zlib.error as error:
        raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The deflated data set cannot be inflated") from error
    raise InvalidInstance(Status.CANNOT_UNDERSTAND, "The data set is cut off")


class _Alike(NamedTuple):
    """What is understood of the elements that are as a rule the same in all instances of a series."""

    sop_class_uid: str
    study_instance_uid: str
    series_instance_uid: str
    modality: str
    number_of_frames: int
    announced: int | None
    orientation: tuple[float, ...]
    is_own_result: bool


@lru_cache(maxsize=256)
def _alike(encoded: tuple[bytes, ...]) -> _Alike:
    """Understand the values of `_ALIKE`, in their order: once for all slices of a series."""
    values = dict(zip(_ALIKE, encoded, strict=True))
    return _Alike(
        sop_class_uid=_uid(_SOP_CLASS_UID, values[_SOP_CLASS_UID]),
        study_instance_uid=_uid(_STUDY_INSTANCE_UID, values[_STUDY_INSTANCE_UID]),
        series_instance_uid=_uid(_SERIES_INSTANCE_UID, values[_SERIES_INSTANCE_UID]),
        modality=_code(_string(values[_MODALITY])),
        number_of_frames=_integer(values[_NUMBER_OF_FRAMES]) or 1,
        announced=_announced(values),
        orientation=_numbers(values[_IMAGE_ORIENTATION_PATIENT]),
        is_own_result=_string(values[_MANUFACTURER_MODEL_NAME]) == MANUFACTURER_MODEL_NAME,
    )


def _string(value: bytes) -> str:
    return value.decode("ascii", "replace").strip("\x00 ")


def _uid(tag: int, value: bytes) -> str:
    """Return a UID that names the instance; vendors' leading zeros are let through, path tricks are not."""
    text = _string(value)
    if not _can_name(text):
        problem = "missing" if not text else "malformed"
        raise InvalidInstance(Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS, f"{_KEYWORDS[tag]} is {problem}", tag)
    return text


def _can_name(text: str) -> bool:
    return _LENIENT_UID.fullmatch(text) is not None and ".." not in text


def _code(modality: str) -> str:
    """Return the Modality as the ledger can hold it: whatever a broken sender puts in, at most 16 plain characters."""
    return "".join(letter for letter in modality if " " <= letter <= "~").strip()[:16]


def _integer(value: bytes) -> int | None:
    try:
        number = int(_string(value))
    except ValueError:
        return None
    return number if 0 <= number <= _LARGEST_INTEGER else None


def _announced(values: Values) -> int | None:
    """Return how many instances the series should have, where a header says so.

    Number of Series Related Instances says it of the series; Number of Slices (PET, NM) and Images in
    Acquisition say it of what usually is the series.
    """
    for number in (
        _integer(values[_NUMBER_OF_SERIES_RELATED_INSTANCES]),
        int.from_bytes(values[_NUMBER_OF_SLICES], "little"),
        _integer(values[_IMAGES_IN_ACQUISITION]),
    ):
        if number is not None and 1 < number <= _LARGEST_INTEGER:
            return number
    return None


def _place(orientation: tuple[float, ...], encoded: bytes) -> SlicePlace | None:
    position = _numbers(encoded)
    if len(orientation) != 6 or len(position) != 3:
        return None
    return SlicePlace(orientation, position)


def _numbers(value: bytes) -> tuple[float, ...]:
    """Return the finite numbers of a text; none where it has anything else."""
    try:
        numbers = tuple(map(float, _string(value).split("\\")))
    except ValueError:
        return ()
    return numbers if all(map(math.isfinite, numbers)) else ()
