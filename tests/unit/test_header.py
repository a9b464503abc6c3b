from __future__ import annotations

import contextlib
import random
import tracemalloc

import pydicom.config
import pytest
from pydicom.uid import JPEGLosslessSV1

from dicom_node.errors import InvalidInstance
from dicom_node.header import is_valid_uid, read_header
from dicom_node.labelling import MANUFACTURER_MODEL_NAME, derive_uid
from dicom_node.services import TRANSFER_SYNTAXES, Status
from tests.datasets import BIG_ENDIAN, CT, DEFLATED, EXPLICIT, IMPLICIT, ct, encoded, uid

PLAIN = [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED]


def refused(data: bytes, syntax: str = EXPLICIT) -> InvalidInstance:
    with pytest.raises(InvalidInstance) as caught:
        read_header(data, syntax)
    assert len(str(caught.value)) <= 64
    return caught.value


@pytest.mark.parametrize("syntax", PLAIN)
def test_the_same_header_is_read_from_every_encoding(syntax):
    header = read_header(encoded(ct(3, announced=40), syntax), syntax)

    assert header.sop_class_uid == CT
    assert header.sop_instance_uid == uid("study", "series", 3)
    assert header.study_instance_uid == uid("study")
    assert header.series_instance_uid == uid("study", "series")
    assert header.modality == "CT"
    assert header.number_of_frames == 1
    assert header.announced == 40
    assert header.place.image_position_patient == (-100.0, -100.0, 15.0)
    assert not header.is_own_result


def test_encapsulated_pixel_data_is_not_looked_into():
    dataset = ct()
    dataset["PixelData"].VR = "OB"
    dataset.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00" + b"\xfe\xff\x00\xe0\x04\x00\x00\x00abcd"
    dataset["PixelData"].is_undefined_length = True

    assert read_header(encoded(dataset), str(JPEGLosslessSV1)).modality == "CT"


def test_a_memoryview_is_read_as_well_as_bytes():
    assert read_header(memoryview(encoded(ct())), EXPLICIT).modality == "CT"


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("missing", [1, 7, 8, 9, 100, 511, 512])
def test_pixel_data_that_is_cut_off_is_noticed_to_the_byte(syntax, missing):
    data = encoded(ct(), syntax)

    error = refused(data[:-missing], syntax)

    assert error.status == Status.CANNOT_UNDERSTAND


def test_a_deflated_dataset_that_is_cut_off_is_noticed():
    data = encoded(ct(), DEFLATED)

    assert refused(data[: len(data) // 2], DEFLATED).status == Status.CANNOT_UNDERSTAND


def test_a_deflated_dataset_larger_than_what_is_looked_at_is_kept_nevertheless(monkeypatch):
    monkeypatch.setattr("dicom_node.header._MAXIMUM_INFLATED", 900)
    dataset = ct()
    dataset.PixelData = bytes(range(256)) * 40

    assert read_header(encoded(dataset, DEFLATED), DEFLATED).modality == "CT"


@pytest.mark.parametrize("syntax", PLAIN)
def test_a_dataset_cut_anywhere_is_refused_never_misread(syntax):
    data = encoded(ct(announced=40), syntax)
    whole = read_header(data, syntax)

    for length in range(0, len(data) - 1, 3):
        try:
            header = read_header(data[:length], syntax)
        except InvalidInstance:
            continue
        # cut between two elements it looks like a dataset without pixels: what was read is still right
        assert header.sop_instance_uid == whole.sop_instance_uid
        assert header.series_instance_uid == whole.series_instance_uid


@pytest.mark.parametrize("syntax", PLAIN)
def test_garbage_is_refused_with_a_status_and_never_with_another_exception(syntax):
    noise = random.Random(4711)

    for size in (1, 7, 8, 9, 64, 300, 5000):
        for _ in range(30):
            assert refused(noise.randbytes(size), syntax).status in {
                Status.CANNOT_UNDERSTAND,
                Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS,
            }


@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES)
def test_a_mutated_dataset_is_read_or_refused(syntax):
    noise = random.Random(1)
    plain = bytearray(encoded(ct(), syntax if syntax in PLAIN else EXPLICIT))

    for _ in range(20):
        mutated = bytearray(plain)
        for _ in range(8):
            mutated[noise.randrange(len(mutated))] = noise.randrange(256)
        with contextlib.suppress(InvalidInstance):
            read_header(bytes(mutated), syntax)


@pytest.mark.parametrize("keyword", ["SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
def test_a_missing_uid_is_named_with_its_tag(keyword):
    dataset = ct()
    tag = dataset[keyword].tag
    del dataset[keyword]

    error = refused(encoded(dataset))

    assert error.status == Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS
    assert error.offending_element == tag
    assert str(error) == f"{keyword} is missing"


@pytest.mark.parametrize(
    "trick",
    [
        "../../etc/passwd",
        "..",
        "1..2",
        "/tmp/x",
        "1.2/3",
        "1.2\\1.3",
        ".",
        ".1",
        "1" * 65,
        "1.2 3",
        "~",
        "1.2\n3",
        "１.２",
    ],
)
def test_a_uid_that_is_a_path_trick_is_refused(trick):
    dataset = ct()
    raw = trick.encode("utf-8")
    raw += b"\0" * (len(raw) % 2)
    data = encoded(dataset)
    original = uid("study", "series").encode()
    original += b"\0" * (len(original) % 2)
    start = data.index(b"\x20\x00\x0e\x00UI")
    data = data[: start + 6] + len(raw).to_bytes(2, "little") + raw + data[start + 8 + len(original) :]

    assert refused(data).status == Status.DATA_SET_DOES_NOT_MATCH_SOP_CLASS


@pytest.fixture
def as_the_node_reads(monkeypatch):
    """`log.configure` tells pydicom to take values as they are; a process that has not done so gets warnings."""
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)


@pytest.mark.usefixtures("as_the_node_reads")
def test_leading_zeros_that_some_vendors_write_are_let_through():
    original = uid("study", "series").encode()
    data = encoded(ct()).replace(original, b"1.02.003".ljust(len(original), b"\0"))

    assert read_header(data, EXPLICIT).series_instance_uid == "1.02.003"
    assert not is_valid_uid("1.02.003")


def test_a_uid_that_the_node_makes_is_valid():
    assert is_valid_uid(derive_uid("a", "b"))


def test_the_nodes_own_results_are_recognised():
    header = read_header(encoded(ct(ManufacturerModelName=MANUFACTURER_MODEL_NAME)), EXPLICIT)

    assert header.is_own_result


@pytest.mark.parametrize(
    ("keyword", "announced"),
    [("NumberOfSeriesRelatedInstances", 64), ("NumberOfSlices", 47), ("ImagesInAcquisition", 200)],
)
def test_the_count_is_announced_in_one_of_three_elements(keyword, announced):
    assert read_header(encoded(ct(**{keyword: announced})), EXPLICIT).announced == announced


@pytest.mark.parametrize("value", [b"1 ", b"0 ", b"-5", b"x ", b"", b"99999999999 ", b"1e400 "])
def test_a_count_that_cannot_be_one_announces_nothing(value):
    data = encoded(ct(announced=7777))
    start = data.index(b"\x20\x00\x09\x12IS")
    data = data[: start + 6] + len(value).to_bytes(2, "little") + value + data[start + 12 :]

    assert read_header(data, EXPLICIT).announced is None


@pytest.mark.parametrize("value", [b"nan\\1\\2 ", b"1\\2 ", b"inf\\0\\0 ", b"a\\b\\c ", b""])
def test_a_position_that_is_none_is_no_position(value):
    dataset = ct()
    data = encoded(dataset)
    start = data.index(b"\x20\x00\x32\x00DS")
    length = int.from_bytes(data[start + 6 : start + 8], "little")
    data = data[: start + 6] + len(value).to_bytes(2, "little") + value + data[start + 8 + length :]

    assert read_header(data, EXPLICIT).place is None


def test_a_modality_is_what_the_ledger_can_hold():
    dataset = ct()
    data = encoded(dataset).replace(b"\x08\x00\x60\x00CS\x02\x00CT", b"\x08\x00\x60\x00CS\x06\x00C\x00\xe4\x1bT ")

    assert read_header(data, EXPLICIT).modality == "CT"


def _in_disorder(element: bytes) -> bytes:
    """Return a data set that only pydicom reads: its first element comes again."""
    whole = encoded(ct(1))
    at = whole.index(b"\x08\x00\x60\x00")
    return whole[:at] + element + whole[:at] + whole[at:]


ITEMS = 100_000
EMPTY = b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * ITEMS + b"\xfe\xff\xdd\xe0\0\0\0\0"
BIG_EMPTY = (
    b"\x00\x08\x11\x15SQ\0\0\xff\xff\xff\xff" + b"\xff\xfe\xe0\x00\0\0\0\0" * ITEMS + b"\xff\xfe\xe0\xdd\0\0\0\0"
)


@pytest.mark.parametrize(
    ("data", "syntax"),
    [
        (BIG_EMPTY + encoded(ct(1), BIG_ENDIAN), BIG_ENDIAN),
        (_in_disorder(EMPTY), EXPLICIT),
        (_in_disorder(b"\x08\x00\x16\x00UN\0\0" + (1 << 27).to_bytes(4, "little") + bytes(1 << 27)), EXPLICIT),
    ],
    ids=["big endian items", "items in disorder", "a value of 128 MB in disorder"],
)
def test_what_only_pydicom_reads_makes_no_more_objects_than_a_header_has(data, syntax):
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInstance) as refused:
            read_header(data, syntax)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()

    assert refused.value.status == 0xC000


def test_a_big_endian_header_with_many_items_is_still_read():
    items = BIG_EMPTY[:12] + BIG_EMPTY[12 : 12 + 8 * 20_000] + BIG_EMPTY[-8:]
    whole = encoded(ct(1), BIG_ENDIAN)
    at = whole.index(b"\x00\x10\x00\x10")

    assert read_header(whole[:at] + items + whole[at:], BIG_ENDIAN) == read_header(whole, BIG_ENDIAN)


def test_a_value_that_is_wanted_is_never_kept_whole_where_it_is_far_too_long():
    data = b"\x08\x00\x16\x00" + (1 << 26).to_bytes(4, "little") + b"1" * (1 << 26)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidInstance):
            read_header(data, IMPLICIT)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
