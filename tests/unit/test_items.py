"""Items are found as pydicom finds them, whatever their lengths are, and what is cut off is not understood."""

from __future__ import annotations

import pytest
from pydicom import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicom_node.elements import NotUnderstood
from dicom_node.items import items_of

INSTANCE, NUMBER, STUDY = 0x00081155, 0x00620004, 0x00081110
WANTED = frozenset({INSTANCE, NUMBER, STUDY})
UNDEFINED = [(False, False), (True, False), (False, True), (True, True)]


def item(number: int, *inner: Dataset) -> Dataset:
    made = Dataset()
    made.ReferencedSOPInstanceUID = f"1.2.{number}"
    made.SegmentLabel = "left"
    made.PurposeOfReferenceCodeSequence = []
    if inner:
        made.ReferencedImageSequence = list(inner)
        made.ReferencedStudySequence = [item(number + 100)]
    return made


def tree(undefined_sequences: bool, undefined_items: bool) -> Dataset:
    inner = [item(3), item(4, item(5))]
    inner[0].SegmentNumber = 7
    root = Dataset()
    root.SourceImageSequence = [item(1), item(2, *inner), item(6)]
    root.walk(
        lambda dataset, element: setattr(element, "is_undefined_length", undefined_sequences and element.VR == "SQ")
    )
    root.walk(lambda dataset, _: setattr(dataset, "is_undefined_length_sequence_item", undefined_items))
    return root


def value_of(dataset: Dataset) -> bytes:
    """The bytes of its one sequence, without the element's own head."""
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return buffer.getvalue()[12:]


def names(found: list[dict[int, bytes]]) -> list[str]:
    return [each[INSTANCE].rstrip(b"\0").decode() for each in found]


@pytest.mark.parametrize(("sequences", "items"), UNDEFINED)
def test_every_item_is_found_at_every_depth(sequences, items):
    found = list(items_of(value_of(tree(sequences, items)), WANTED))

    second = ["1.2.2", "1.2.102", "1.2.3", "1.2.4", "1.2.104", "1.2.5"]
    assert [names(each) for each in found] == [["1.2.1"], second, ["1.2.6"]]
    assert [each.get(NUMBER) for each in found[1]] == [None, None, b"\7\0", None, None, None]
    assert [STUDY in each for each in found[1]] == [True, False, False, True, False, False]


@pytest.mark.parametrize(("sequences", "items"), UNDEFINED)
def test_what_is_passed_over_is_not_looked_at(sequences, items):
    found = list(items_of(value_of(tree(sequences, items)), WANTED, {STUDY}))

    assert names(found[1]) == ["1.2.2", "1.2.3", "1.2.4", "1.2.5"]


@pytest.mark.parametrize(("sequences", "items"), UNDEFINED)
def test_whatever_is_cut_off_is_not_understood(sequences, items):
    dataset = tree(sequences, items)
    del dataset.SourceImageSequence[2], dataset.SourceImageSequence[0]
    value = value_of(dataset)
    whole = {0, len(value) - 8 * sequences}  # before the sequence's own delimiter

    for end in set(range(len(value))) - whole:
        with pytest.raises(NotUnderstood):
            list(items_of(value[:end], WANTED))


@pytest.mark.parametrize("value", [b"not a sequence at all", b"\xfe\xff\x00\xe0\x08\0\0\0\x08\0\x55\x11\x02\0\0\0"])
def test_what_is_no_sequence_with_vrs_is_not_understood(value):
    with pytest.raises(NotUnderstood):
        list(items_of(value, WANTED))
