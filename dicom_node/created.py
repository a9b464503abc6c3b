"""The objects that the node creates, read off real ones: each kind is encoded for a small series and listed."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np
from pydicom import DataElement, Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicom_node.findings import Box, Code, Finding, Findings, Map, Measurement, Segment
from dicom_node.forms import Form
from dicom_node.labelling import Context, ModelIdentity, derive_uid
from dicom_node.results import ORDER, Result, encode_all
from dicom_node.services import RESULT_SOP_CLASSES
from dicom_node.source import Source, SourceFrame

_SLICES, _SIDE = 3, 16
_CODED = ("CodeValue", "CodingSchemeDesignator", "CodeMeaning")


def created_objects() -> Iterator[str]:
    """Yield the section on created objects: the attributes of each and the codes in it (PS3.2 N.8)."""
    source, results = _series(), created_results()
    yield from ("## N.8 Created objects", "")
    yield "The attributes of each object as it is encoded for a small CT series; other sources add what they state."
    yield "*source*: as in the images. *set*: made by the node. A value is given where it is always the same."
    seen: set[str] = set()
    for result in results:
        name = RESULT_SOP_CLASSES[str(result.dataset.SOPClassUID)]
        if name not in seen:
            seen.add(name)
            yield from _object(name, result, source)


def created_results() -> list[Result]:
    """Return every kind of object in every form, for a series of three small slices."""
    return encode_all(ORDER, _findings(), _series(), _context(), (Form(), Form("LABELMAP")))


def _object(name: str, result: Result, source: Source) -> Iterator[str]:
    yield from ("", f"### {name} Storage (`{result.kind}`)", "")
    yield "| tag | VR | attribute | origin |"
    yield "|---|---|---|---|"
    for element in result.dataset:
        yield f"| {element.tag} | {element.VR} | {element.keyword} | {_origin(element, source.datasets[0])} |"
    codes = sorted({" ".join(code) for code in _codes(result.dataset)})
    yield from ("", f"Codes (value, scheme, meaning): {'; '.join(codes)}." if codes else "No codes.")


def _origin(element: DataElement, image: Dataset) -> str:
    if element.keyword in image and image[element.keyword].value == element.value and element.VR != "SQ":
        return "source"
    return f"set: {element.value}" if element.VR == "CS" and element.value else "set"


def _codes(dataset: Dataset) -> Iterator[tuple[str, str, str]]:
    for element in dataset:
        for item in element.value if element.VR == "SQ" else ():
            if all(keyword in item for keyword in _CODED):
                yield str(item.CodeValue), str(item.CodingSchemeDesignator), str(item.CodeMeaning)
            yield from _codes(item)


def _series() -> Source:
    pixels = np.zeros((_SIDE, _SIDE), np.int16)
    frames = tuple(SourceFrame(number) for number in range(_SLICES))
    return Source(tuple(_image(number) for number in range(_SLICES)), frames, lambda _: pixels)


def _image(number: int) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": derive_uid("conformance", str(number)),
        "StudyInstanceUID": derive_uid("conformance study"),
        "SeriesInstanceUID": derive_uid("conformance series"),
        "FrameOfReferenceUID": derive_uid("conformance frame of reference"),
        "Modality": "CT",
        "PatientID": "1",
        "PatientName": "Doe^Jo",
        "PatientBirthDate": "19700101",
        "PatientSex": "O",
        "StudyID": "1",
        "StudyDate": "20260101",
        "StudyTime": "120000",
        "AccessionNumber": "1",
        "ReferringPhysicianName": "Roe^Jo",
        "BodyPartExamined": "CHEST",
        "InstanceNumber": number + 1,
        "SeriesNumber": 1,
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "ImagePositionPatient": [0, 0, number * 2],
        "PixelSpacing": [1, 1],
        "SliceThickness": 2,
        "Rows": _SIDE,
        "Columns": _SIDE,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "WindowCenter": 40,
        "WindowWidth": 400,
    }
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def _findings() -> Findings:
    """Return one outlined nodule and another thing that was looked for in vain."""
    labels = np.zeros((_SLICES, _SIDE, _SIDE), np.uint8)
    labels[1, 4:9, 3:7] = 1
    nodule = Code("27925004", "SCT", "Nodule")
    category = Code("49755003", "SCT", "Morphologically abnormal structure")
    lung, right = Code("39607008", "SCT", "Lung"), Code("24028007", "SCT", "Right")
    volume = Measurement(Code("118565006", "SCT", "Volume"), 0.04, Code("cm3", "UCUM", "cubic centimeter"))
    tracking = ("Nodule 1", derive_uid("conformance nodule"))
    segment = Segment(0, 1, "Nodule 1", category, nodule, (255, 210, 0), *tracking, lung, right, (volume,))
    box = Box(1, 3.0, 4.0, 7.0, 9.0)
    finding = Finding("Nodule 1", nodule, category, box, 0.9, *tracking, 0, lung, right, (volume,))
    probability = Map("nodule", Code("122157", "DCM", "Probability"), labels.astype(np.float32))
    return Findings((labels,), (segment,), (finding,), (nodule,), maps=(probability,))


def _context() -> Context:
    model = ModelIdentity("example", "1.0.0", "Example", "dicom-node", "0" * 64)
    return Context(model, "0" * 64, datetime(2026, 1, 1, tzinfo=UTC))
