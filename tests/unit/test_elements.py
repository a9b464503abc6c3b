"""The scan of elements finds what pydicom finds, in every file that it does not refuse."""

from __future__ import annotations

import random
import struct
import tracemalloc
from io import BytesIO
from pathlib import Path

import pydicom.data
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian

from dicom_node import elements
from dicom_node.elements import PIXEL_DATA, UNDEFINED_LENGTH, CutOff, NotUnderstood, Place, items, scan
from tests.datasets import EXPLICIT, IMPLICIT, ct, encoded

ROWS, INSTANCE_NUMBER, REFERENCED_IMAGES = 0x00280010, 0x00200013, 0x00081140
PYDICOMS_FILES = sorted(Path(pydicom.data.__file__).parent.joinpath("test_files").rglob("*.dcm"))
ALL = frozenset([ROWS, INSTANCE_NUMBER, REFERENCED_IMAGES, PIXEL_DATA])


def nested(depth: int, is_undefined: bool = True) -> Dataset:
    dataset = ct(7)
    inner = dataset
    for _ in range(depth):
        item = Dataset()
        item.ReferencedSOPInstanceUID = "1.2.3"
        item.is_undefined_length_sequence_item = is_undefined
        inner.ReferencedImageSequence = [item]
        inner["ReferencedImageSequence"].is_undefined_length = is_undefined
        inner = item
    return dataset


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    size = len(value) if length is None else length
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if not vr:
        return head + struct.pack("<L", size) + value
    wide = vr in (b"OB", b"OW", b"SQ", b"UN", b"UT")
    return head + vr + (struct.pack("<HL", 0, size) if wide else struct.pack("<H", size)) + value


def places(path: Path) -> tuple[bytes, bool, dict[int, tuple[int, int]]] | None:
    """A file's data set, whether it has no VRs, and where pydicom finds its values."""
    try:
        dataset = dcmread(path)
    except Exception:
        return None  # a file of pydicom's own tests for broken files
    syntax = dataset.file_meta.get("TransferSyntaxUID") if hasattr(dataset, "file_meta") else None
    if syntax is None or syntax in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian):
        return None
    raw = path.read_bytes()
    if raw[128:140] != b"DICM\x02\0\0\0UL\x04\0":
        return None
    start = 144 + int.from_bytes(raw[140:144], "little")
    expected = {}
    for tag in list(dataset.keys()):
        found = dataset.get_item(tag)
        if hasattr(found, "value_tell") and getattr(found, "length", UNDEFINED_LENGTH) != UNDEFINED_LENGTH:
            expected[int(tag)] = (found.value_tell - start, found.length)
    return raw[start:], syntax.is_implicit_VR, expected


def test_places_are_those_of_pydicom_in_all_of_its_files():
    compared = refused = 0
    for path in PYDICOMS_FILES:
        if (known := places(path)) is None:
            continue
        data, is_implicit, expected = known
        wanted = frozenset([*expected, PIXEL_DATA])
        try:
            found = scan(memoryview(data), is_implicit, wanted, stop_at=1 << 32)
        except NotUnderstood:
            refused += 1
            continue
        compared += 1
        assert {tag: found[tag][1:] for tag in expected} == expected, path.name

    assert compared >= 60
    assert refused <= compared // 10


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_values_are_found_behind_sequences_of_any_length_and_depth(syntax):
    is_implicit = syntax == IMPLICIT
    for depth, is_undefined in ((0, True), (1, True), (1, False), (3, True), (40, True)):
        data = encoded(nested(depth, is_undefined), syntax)
        found = scan(data, is_implicit, ALL)

        assert data[found[ROWS].offset :][: found[ROWS].length] == b"\x10\0"
        assert data[found[INSTANCE_NUMBER].offset :][:2] == b"7 "
        assert found[PIXEL_DATA] == Place("" if is_implicit else "OW", len(data) - 512, 512)
        assert (REFERENCED_IMAGES in found) == (depth > 0)


def test_a_hundred_thousand_sequences_in_one_another_are_no_recursion():
    depth = 100_000
    opening = element(REFERENCED_IMAGES, b"", b"", UNDEFINED_LENGTH) + element(0xFFFEE000, b"", b"", UNDEFINED_LENGTH)
    closing = element(0xFFFEE00D, b"", b"") + element(0xFFFEE0DD, b"", b"")
    data = opening * depth + closing * depth + element(ROWS, b"", b"\x20\0")

    assert scan(data, True, ALL)[ROWS] == Place("", len(data) - 2, 2)


def test_an_unknown_element_of_undefined_length_has_no_vrs_inside():
    inside = element(0xFFFEE000, b"", element(ROWS, b"", b"\x01\0"), UNDEFINED_LENGTH) + element(0xFFFEE00D, b"", b"")
    unknown = element(0x00091010, b"UN", inside, UNDEFINED_LENGTH) + element(0xFFFEE0DD, b"", b"")
    data = unknown + element(ROWS, b"US", b"\x20\0")

    assert scan(data, False, ALL) == {ROWS: Place("US", len(data) - 2, 2)}


def test_what_comes_after_the_last_wanted_element_is_not_looked_at():
    data = encoded(ct(1), EXPLICIT)
    found = scan(data, False, frozenset([INSTANCE_NUMBER]))
    end = found[INSTANCE_NUMBER].offset + found[INSTANCE_NUMBER].length

    assert scan(data[:end] + element(0x00200032, b"DS", b""), False, frozenset([INSTANCE_NUMBER])) == found
    assert scan(data[:end] + element(ROWS, b"US", b"", 600), False, frozenset([INSTANCE_NUMBER])) == found


def test_pixel_data_need_not_be_there():
    data = encoded(ct(1), EXPLICIT)
    found = scan(data, False, ALL)

    assert scan(data[: found[PIXEL_DATA].offset], False, ALL) == found
    assert scan(data[: found[PIXEL_DATA].offset], False, ALL, is_whole=False) == found


def test_a_beginning_is_read_as_soon_as_it_is_enough():
    data = encoded(nested(2), EXPLICIT)
    whole = scan(data, False, ALL)
    enough = whole[PIXEL_DATA].offset

    for end in range(0, enough, 3):
        with pytest.raises(CutOff):
            scan(data[:end], False, ALL, is_whole=False)
    assert scan(data[:enough], False, ALL, is_whole=False) == whole


GOOD = element(INSTANCE_NUMBER, b"IS", b"7 ")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(element(ROWS, b"US", b"\x20\0") + GOOD, id="tags that descend"),
        pytest.param(GOOD + GOOD, id="a tag twice"),
        pytest.param(GOOD + element(ROWS, b"ZZ", b"\x20\0"), id="a VR that is none"),
        pytest.param(GOOD + element(ROWS, b"\0\0", b"\x20\0"), id="no VR"),
        pytest.param(GOOD + b"\xfe\xff\x00\xe0" + b"OB\0\0\0\0\0\0", id="an item outside a sequence"),
        pytest.param(GOOD + element(ROWS, b"US", b"\x20\0", 4), id="a value cut off"),
        pytest.param(GOOD + b"\x28\0\x10", id="a head cut off"),
        pytest.param(GOOD + element(0x00200060, b"UT", b"", UNDEFINED_LENGTH), id="text without a length"),
        pytest.param(GOOD + element(0x00209222, b"SQ", b"", UNDEFINED_LENGTH), id="a sequence without an end"),
        pytest.param(
            GOOD + element(0x00209222, b"SQ", GOOD + element(0xFFFEE0DD, b"", b""), UNDEFINED_LENGTH),
            id="a sequence without items",
        ),
        pytest.param(
            GOOD + element(0x00209222, b"OB", element(0xFFFEE000, b"", b"", UNDEFINED_LENGTH), UNDEFINED_LENGTH),
            id="a fragment without a length",
        ),
        pytest.param(
            GOOD + element(0x00209222, b"SQ", element(0xFFFEE000, b"", b"ab", 100), UNDEFINED_LENGTH),
            id="an item cut off",
        ),
    ],
)
def test_nonsense_is_refused(data):
    assert INSTANCE_NUMBER in scan(GOOD, False, ALL)
    with pytest.raises(NotUnderstood):
        scan(data, False, ALL)


def test_a_data_set_with_vrs_is_not_taken_for_one_without():
    with pytest.raises(NotUnderstood):
        scan(encoded(ct(1), EXPLICIT), True, ALL)
    with pytest.raises(NotUnderstood):
        scan(encoded(ct(1), IMPLICIT), False, ALL)


def test_whatever_the_bytes_the_answer_is_places_within_them_or_a_refusal():
    chance = random.Random(20261125)
    seeds = [
        (encoded(nested(depth), syntax), syntax == IMPLICIT) for depth in (0, 2) for syntax in (IMPLICIT, EXPLICIT)
    ]
    answers = {True: 0, False: 0}
    for _ in range(6_000):
        original, is_implicit = chance.choice(seeds)
        data = bytearray(original)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(data) - 4)
            data[at : at + chance.choice((1, 2, 4))] = chance.choice(
                (b"\xff\xff\xff\xff", b"\xfe\xff\xdd\xe0", b"\0", b"SQ", b"UN", b"OB", bytes([chance.randrange(256)]))
            )
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        try:
            found = scan(memoryview(data), is_implicit, ALL)
        except NotUnderstood:
            answers[False] += 1
            continue
        answers[True] += 1
        for tag, place in found.items():
            assert 0 <= place.offset <= len(data)
            assert tag == PIXEL_DATA or place.offset + place.length <= len(data)
    assert min(answers.values()) > 500


def test_where_both_read_mutated_bytes_they_read_the_same():
    """What the scan takes for understood must be what pydicom understands, or two parts of the node would differ."""
    chance = random.Random(7)
    original = encoded(nested(2), EXPLICIT)
    compared = 0
    for _ in range(1_000):
        data = bytearray(original)
        for _ in range(chance.randint(1, 2)):
            data[chance.randrange(len(data) - 530)] = chance.randrange(256)
        try:
            found = scan(data, False, ALL)
            known = dcmread(BytesIO(data), force=True)
        except Exception:
            continue
        if not known.is_implicit_VR and known.is_little_endian:
            expected = known.get_item(ROWS)
            if ROWS in found and expected is not None and hasattr(expected, "value_tell"):
                compared += 1
                assert found[ROWS][1:] == (expected.value_tell, expected.length)
    assert compared > 300


def test_what_is_deeper_than_anything_is_not_understood_and_costs_little(monkeypatch):
    monkeypatch.setattr(elements, "_DEEPEST", 1000)
    data = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 100_000
    tracemalloc.start()
    try:
        with pytest.raises(NotUnderstood):
            scan(data, False, frozenset({0x00080016}) | {0x0020000D})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("is_undefined", [True, False])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_items_are_those_that_pydicom_reads(syntax, is_undefined):
    outer = Dataset()
    outer.ReferencedSeriesSequence = [nested(depth, is_undefined) for depth in (0, 1, 3)]
    outer["ReferencedSeriesSequence"].is_undefined_length = is_undefined
    for item in outer.ReferencedSeriesSequence:
        item.is_undefined_length_sequence_item = is_undefined
    data = encoded(outer, syntax)
    place = scan(data, syntax == IMPLICIT, frozenset({0x00081115}))[0x00081115]

    assert [bytes(item) for item in items(data, place, syntax == IMPLICIT)] == [
        encoded(item, syntax) for item in outer.ReferencedSeriesSequence
    ]


@pytest.mark.parametrize("cut", [1, 7, 9, 30])
def test_items_that_are_cut_off_are_not_understood(cut):
    inside = b"\xfe\xff\x00\xe0\x0a\0\0\0" + b"x" * 10
    with pytest.raises(NotUnderstood):
        list(items((inside * 2)[:-cut], Place("SQ", 0, 36), False))
