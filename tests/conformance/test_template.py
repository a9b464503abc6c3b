"""Sequences that are encoded here have the bytes that pydicom would write."""

from __future__ import annotations

from io import BytesIO

from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.valuerep import DSfloat

from dicom_node.results.template import encode_items, leave_encoded
from tests.conformance.cases import encoded


def by_pydicom(dataset: Dataset) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, dataset)
    return buffer.getvalue()


def test_every_sequence_of_every_kind_of_result(case_of):
    sequences = 0
    for result in case_of().results:
        read = dcmread(BytesIO(encoded(result.dataset)), stop_before_pixels=True)
        for element in [each for each in read if each.VR == "SQ"]:
            alone = Dataset()
            alone.SpecificCharacterSet = "ISO_IR 192"
            alone[element.tag] = element
            expected = by_pydicom(alone)
            encode_items(alone, element.keyword)
            leave_encoded(alone)
            assert by_pydicom(alone) == expected, element.keyword
            sequences += 1
    assert sequences > 20


def test_values_of_every_sort():
    item = Dataset()
    item.CodeMeaning = "Größe 雪"
    item.TextValue = "odd"
    item.UID = "1.2.3"
    item.PersonName = "Müller^Jörg=雪"
    item.NumericValue = [DSfloat("1.50"), DSfloat(2.25)]
    item.FloatingPointValue = 1.25
    item.SegmentNumber = 3
    item.GraphicData = [1.0, 2.0]
    item.ReferencedFrameNumber = [1, 20]
    item.ImageType = ["DERIVED", "PRIMARY"]
    item.UniversalEntityID = None
    item.URNCodeValue = "urn:odd"
    item.LongCodeValue = "x" * 70_001
    item.ConceptCodeSequence = []
    root = Dataset()
    root.SpecificCharacterSet = "ISO_IR 192"
    root.ContentSequence = [item, Dataset()]
    expected = by_pydicom(root)

    encode_items(root, "ContentSequence")
    leave_encoded(root)

    assert by_pydicom(root) == expected
