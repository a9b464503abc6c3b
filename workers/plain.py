"""Grey images of one frame, read quickly: headers by a scan, pixels, compressed or not, in one read.

Images of a series say the same of nearly everything. Those whose bytes for all that matters are the same are read as
pydicom reads the first of them, with the place, number and time of each; whatever is not understood is left to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.datadict import tag_for_keyword
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from dicom_node import codecs
from dicom_node.elements import PIXEL_DATA, UNDEFINED_LENGTH, CutOff, NotUnderstood, Place, scan
from dicom_node.errors import InputRefused
from dicom_node.runs import MOST_EXPANDED, unpacked
from dicom_node.source import Instance, Lazy, instance_of
from workers.slices import TRAITS, Slice, read_header, slices_of

_META_HEAD = 144  # preamble, DICM and the group length of the meta information
_TRANSFER_SYNTAX = 0x00020010
_HEADS = (16 * 1024, 256 * 1024, 4 * 1024 * 1024)  # bytes, the next where one is not enough
_POSITION, _NUMBER, _TIME, _NAME = (
    int(tag_for_keyword(keyword) or 0)
    for keyword in ("ImagePositionPatient", "InstanceNumber", "AcquisitionTime", "SOPInstanceUID")
)
_ITEM, _END_OF_SEQUENCE = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
_SAME = frozenset(
    # what is the same in all images that are read as the first of them
    int(tag_for_keyword(keyword) or 0)
    for keyword in (
        *("SpecificCharacterSet", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
        *("PatientID", "Modality", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns"),
        *("PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing"),
        *("ImageOrientationPatient", "SliceThickness", "RescaleSlope", "RescaleIntercept", "AcquisitionNumber"),
        *("PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "SharedFunctionalGroupsSequence"),
        *("PerFrameFunctionalGroupsSequence", "DiffusionGradientDirectionSequence", "ExtendedOffsetTable"),
        *(keyword for name, keywords in TRAITS if name != "AcquisitionTime" for keyword in keywords),
    )
)
_ROWS, _COLUMNS, _BITS, _SAMPLES, _FRAMES = (
    int(tag_for_keyword(keyword) or 0)
    for keyword in ("Rows", "Columns", "BitsAllocated", "SamplesPerPixel", "NumberOfFrames")
)
_OFFSETS = int(tag_for_keyword("ExtendedOffsetTable") or 0)
_WANTED = _SAME | {_POSITION, _NUMBER, _TIME, _NAME, PIXEL_DATA}
_TIME_TRAIT = [name for name, _ in TRAITS].index("AcquisitionTime")
_decimals = re.compile(rb"[0-9.+\-eE ]+(\\[0-9.+\-eE ]+){2}").fullmatch
_integer = re.compile(rb" *[+-]?[0-9]{1,10} *").fullmatch
_time = re.compile(rb"[0-9.]* ?").fullmatch
_uid = re.compile(rb"[0-9][0-9.]*\0?").fullmatch

Sameness = tuple[str, tuple[tuple[int, str, bytes], ...]]
"""The transfer syntax, and of each element that matters its tag, its VR and its bytes."""


@dataclass(frozen=True, slots=True)
class Plain:
    """What a scan says of a file: what it shares with others, its own name and place, where its pixels are."""

    sameness: Sameness
    sop_instance_uid: str
    written: tuple[str, ...]  # the position as it is written
    position: tuple[float, float, float]
    instance_number: int
    acquisition_time: str
    word: int  # bytes of a pixel
    offset: int
    length: int

    @property
    def is_packed(self) -> bool:
        """Return whether its pixels are in run lengths: `offset` and `length` are those of the one fragment."""
        return self.sameness[0] == RLELossless

    @property
    def has_codec(self) -> bool:
        """Return whether its pixels are a frame for `dicom_node.codecs`, in one fragment, too."""
        return codecs.is_available(self.sameness[0])


def glance(path: Path) -> Plain | None:
    """Return what a scan of the header says; None where pydicom must look."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            for length in _HEADS:
                try:
                    return _understood(os.pread(file.fileno(), length, 0), size)
                except CutOff:
                    if length >= size:
                        return None
    except (OSError, NotUnderstood, ValueError):
        return None
    return None


def _understood(head: bytes, size: int) -> Plain | None:
    if head[128:140] != b"DICM\x02\0\0\0UL\x04\0":
        return None
    start = _META_HEAD + int.from_bytes(head[140:_META_HEAD], "little")
    view = memoryview(head)
    meta = scan(view[_META_HEAD:start], False, frozenset([_TRANSFER_SYNTAX]))
    syntax = _bytes(view[_META_HEAD:start], meta.get(_TRANSFER_SYNTAX)).rstrip(b"\0").decode("ascii")
    is_fragment = syntax == RLELossless or codecs.is_available(syntax)
    if not is_fragment and syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        return None
    data = view[start:]
    found = scan(data, syntax == ImplicitVRLittleEndian, _WANTED, is_whole=len(head) >= size)
    word, pixels = _pixels(data, found, is_fragment)
    if not word:
        return None
    own = [_bytes(data, found.get(tag)) for tag in (_POSITION, _NUMBER, _TIME, _NAME)]
    position, number, time, name = own
    if not (_decimals(position) and (not number or _integer(number)) and _time(time) and _uid(name)):
        return None
    there = _fragment(data, found[PIXEL_DATA]) if is_fragment else found[PIXEL_DATA]
    if start + there.offset + there.length > size or pixels * word > MOST_EXPANDED * there.length:
        return None
    written = tuple(part.strip() for part in position.decode().split("\\"))
    x, y, z = (float(part) for part in written)
    same = tuple((tag, found[tag].vr, _bytes(data, found[tag])) for tag in sorted(_SAME & found.keys()))
    return Plain(
        sameness=(syntax, same),
        sop_instance_uid=name.rstrip(b"\0").decode(),
        written=written,
        position=(x, y, z),
        instance_number=int(number or 0),
        acquisition_time=time.decode().strip(),
        word=word,
        offset=start + there.offset,
        length=there.length,
    )


def _bytes(data: memoryview, place: Place | None) -> bytes:
    return b"" if place is None else bytes(data[place.offset : place.offset + place.length])


def _fragment(data: memoryview, pixels: Place) -> Place:
    """Return the place of the first fragment, behind the table of offsets (PS3.5 A.4): that of the only frame.

    Of run lengths the first is all that is needed, or too short to be understood; `plain_frame` asks for no other.
    """
    table = _item(data, pixels.offset)
    if bytes(data[table.offset : table.offset + table.length]) not in (b"", bytes(4)):
        raise NotUnderstood("the only frame does not begin with the first fragment")
    return _item(data, table.offset + table.length)


def _item(data: memoryview, at: int) -> Place:
    if len(data) < at + 8:
        raise CutOff("the data set is cut off")
    if data[at : at + 4] != _ITEM:
        raise NotUnderstood("pixel data has something else than items")
    return Place("", at + 8, int.from_bytes(data[at + 4 : at + 8], "little"))


def _pixels(data: memoryview, found: Mapping[int, Place], is_fragment: bool) -> tuple[int, int]:
    """Return how many bytes a pixel has, and how many pixels there are.

    (0, 0) where they are not one frame of whole words, one sample each, and all there.
    """

    def number(tag: int) -> int:
        value = _bytes(data, found.get(tag))
        return int.from_bytes(value, "little") if len(value) == 2 else 0

    pixels, word = number(_ROWS) * number(_COLUMNS), number(_BITS) // 8
    is_plain = (
        number(_BITS) in (8, 16)
        and number(_SAMPLES) == 1
        and (_bytes(data, found.get(_FRAMES)) or b"1 ").strip() == b"1"
        and pixels > 0
        and PIXEL_DATA in found
        and found[PIXEL_DATA].length == (UNDEFINED_LENGTH if is_fragment else pixels * word + pixels * word % 2)
        and found[PIXEL_DATA].vr in ("", "OB", "OW")
        and not (is_fragment and _OFFSETS in found)
    )
    return (word, pixels) if is_plain else (0, 0)


def plain_words(path: Path, plain: Plain, shape: tuple[int, int]) -> npt.NDArray[np.unsignedinteger] | None:
    """Return the words of a file's pixel data, of `shape`; None where pydicom must decode them.

    Raises:
        InputRefused: the file is not what it was.
    """
    pixels = shape[0] * shape[1]
    data = _read(path, plain)
    if not plain.is_packed:
        return np.frombuffer(data, f"<u{plain.word}", count=pixels).reshape(shape)
    try:
        return unpacked(data, pixels, plain.word).reshape(shape)
    except NotUnderstood:
        return None


def plain_frame(path: Path, plain: Plain) -> bytes | None:
    """Return the compressed frame of a file; None where it may have more than one fragment.

    Raises:
        InputRefused: the file is not what it was.
    """
    data = _read(path, plain, more=len(_END_OF_SEQUENCE))
    return data[: plain.length] if data[plain.length :] == _END_OF_SEQUENCE else None


def _read(path: Path, plain: Plain, *, more: int = 0) -> bytes:
    """Return the bytes of the pixel data, and so many `more` as far as there are any."""
    with path.open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), plain.length + more, plain.offset)
    if len(data) < plain.length:
        raise InputRefused("an instance cannot be read: it has become shorter")
    return data


class Headers(Lazy):
    """The headers of files, each read when it is asked for: of images that are read as another, seldom any."""

    def __init__(self, paths: Sequence[Path], known: Mapping[int, Dataset], like: Mapping[int, int]) -> None:
        """Take the headers that are `known`, by their number; file n says what file `like[n]` says."""
        super().__init__(len(paths), known)
        self._paths = paths
        self._like = like

    def make(self, number: int) -> Dataset:
        """Read a header; raise InputRefused where it cannot be read any more."""
        return read_header(self._paths[number])

    def shared(self, number: int) -> Dataset:
        """Return a header that says the same as that of `number` but for its place, number, time and name."""
        return self[self._like.get(number, number)]

    def different(self) -> list[Dataset]:
        """Return the headers that say different things of more than their place, number, time and name."""
        return [self[number] for number in dict.fromkeys(self._like.get(each, each) for each in range(len(self)))]

    def of(self, numbers: Sequence[int]) -> Headers:
        """Return those of some of the files, in that order."""
        place = {number: index for index, number in enumerate(numbers)}
        first: dict[int, int] = {}
        like = {index: first.setdefault(self._like.get(number, number), index) for number, index in place.items()}
        known = {index: self._known[number] for number, index in place.items() if number in self._known}
        return Headers([self._paths[number] for number in numbers], known, like)


def instances_of(headers: Headers, glances: Sequence[Plain | None], numbers: Sequence[int]) -> tuple[Instance, ...]:
    """Return what is different in some of the files, in that order; only what no scan understood is read."""
    first: dict[Sameness, int] = {}
    return tuple(
        instance_of(headers[number], index)
        if (each := glances[number]) is None
        else Instance(each.sop_instance_uid, each.written, first.setdefault(each.sameness, index))
        for index, number in enumerate(numbers)
    )


def headers_of(paths: Sequence[Path], glances: Sequence[Plain | None], read: Iterator[Dataset]) -> Headers:
    """Return the headers of a series; `read` are those of one file of each sameness, and of all others."""
    return Headers(paths, dict(zip(to_read(glances), read, strict=True)), _likeness(glances))


def to_read(glances: Sequence[Plain | None]) -> list[int]:
    """Return the numbers of the files that pydicom must read."""
    like = _likeness(glances)
    return [number for number in range(len(glances)) if like[number] == number]


def _likeness(glances: Sequence[Plain | None]) -> dict[int, int]:
    first: dict[Sameness, int] = {}
    return {
        number: number if each is None else first.setdefault(each.sameness, number)
        for number, each in enumerate(glances)
    }


def placed(glances: Sequence[Plain | None], headers: Headers) -> Iterator[Slice]:
    """Yield the slices of a series as `slices_of` gives them."""
    models: dict[Sameness, Slice | None] = {}
    for number, each in enumerate(glances):
        if each is None:
            yield from slices_of(number, headers[number])
            continue
        if each.sameness not in models:
            models[each.sameness] = _model(number, each, headers)
        model = models[each.sameness]
        if model is None:
            yield from slices_of(number, headers[number])
        else:
            yield _at(model, number, each)


def _model(number: int, each: Plain, headers: Headers) -> Slice | None:
    """Return the slice that others are like; None where a scan and pydicom do not see the same in it."""
    made = list(slices_of(number, headers[number]))
    if len(made) != 1:
        return None
    again = _at(made[0], number, each)
    same = replace(again, position=made[0].position) == made[0] and np.array_equal(again.position, made[0].position)
    return made[0] if same else None


def _at(model: Slice, number: int, each: Plain) -> Slice:
    traits = (*model.traits[:_TIME_TRAIT], each.acquisition_time, *model.traits[_TIME_TRAIT + 1 :])
    return replace(
        model,
        instance=number,
        position=np.array(each.position),
        rank=(model.rank[0], each.instance_number),
        traits=traits,
    )
