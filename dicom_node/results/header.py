"""What every result object carries, whatever its kind: who made it, from what, and how far to trust it."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import highdicom as hd
from pydicom import DataElement, Dataset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.sr.coding import Code as PydicomCode
from pydicom.valuerep import PersonName

from dicom_node.findings import Code
from dicom_node.labelling import MANUFACTURER, MANUFACTURER_MODEL_NAME, Context
from dicom_node.source import Source

ARTIFICIAL_INTELLIGENCE = PydicomCode("123110", "DCM", "Artificial Intelligence")
PROCESSING_EQUIPMENT = PydicomCode("109102", "DCM", "Processing Equipment")

_FROM_SOURCE = (
    # what highdicom does not copy of the patient, the study and the anatomy (PS3.3 C.7.1 to C.7.3)
    "IssuerOfPatientID",
    "OtherPatientIDsSequence",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "EthnicGroup",
    "StudyDescription",
    "ProcedureCodeSequence",
    "IssuerOfAccessionNumberSequence",
    "TimezoneOffsetFromUTC",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialSubjectID",
)
_FROM_SOURCE_IMAGE = ("BodyPartExamined", "Laterality")  # of an image's General Series; a document has none
_DOCUMENTS = frozenset({"SR", "KO"})
_REFERENCES = ("ReferencedStudySequence", "ReferencedPatientSequence", "ReferencedPerformedProcedureStepSequence")


def code(of: Code) -> PydicomCode:
    """Return a code as highdicom takes it."""
    return PydicomCode(of.value, of.scheme, of.meaning)


def contributing_equipment(context: Context) -> list[hd.ContributingEquipment]:
    """Return the item that says which model made the object (IHE AIR 6.5.3.1)."""
    item = hd.ContributingEquipment(
        manufacturer=context.model.manufacturer[:64],
        purpose_of_reference=PROCESSING_EQUIPMENT,
        manufacturer_model_name=context.model.name,
        software_versions=context.model.version,
        contribution_datetime=context.now,
        contribution_description=context.disclaimer[:64],
    )
    item.DeviceUID = context.model.device_uid
    return [item]


def algorithm_parameters(context: Context, parameters: dict[str, str]) -> dict[str, str]:
    """Return what the algorithm ran with, the digest that names its weights first."""
    return {"model digest": context.model.digest, **parameters}


def complete(dataset: Dataset, reference: Dataset, context: Context, *, series_offset: int) -> Dataset:
    """Fill in what highdicom leaves out, from the first of the `prepared` headers. Returns `dataset`."""
    wanted = _FROM_SOURCE if dataset.Modality in _DOCUMENTS else _FROM_SOURCE + _FROM_SOURCE_IMAGE
    for keyword in wanted:
        if reference.get(keyword) not in (None, "") and keyword not in dataset:
            dataset[keyword] = deepcopy(reference[keyword])
    _mend_what_is_broken(dataset)
    dataset.SeriesNumber = context.series_number + series_offset
    dataset.SeriesDescription = context.series_description()
    dataset.SeriesDate = dataset.ContentDate = f"{context.now:%Y%m%d}"
    dataset.SeriesTime = dataset.ContentTime = f"{context.now:%H%M%S}"
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = dataset.ContentDate, dataset.ContentTime
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = MANUFACTURER_MODEL_NAME
    dataset.SoftwareVersions = list(context.software_versions)
    dataset.DeviceSerialNumber = context.ae_title
    dataset.ContentQualification = context.qualification
    return dataset


def _mend_what_is_broken(dataset: Dataset) -> None:
    """Mend what is copied from the source and is worse than absent: a reference or a method without content."""
    for keyword in _REFERENCES:
        if any("ReferencedSOPClassUID" not in item for item in dataset.get(keyword, ())):
            del dataset[keyword]
    stated = dataset.get("DeidentificationMethod") or dataset.get("DeidentificationMethodCodeSequence")
    if dataset.get("PatientIdentityRemoved") == "YES" and not stated:
        dataset.DeidentificationMethod = "not stated by the source"  # type 1C: it must say something


def made_by(context: Context) -> dict[str, Any]:
    """Return the arguments that every highdicom constructor takes about the maker."""
    return {
        "manufacturer": MANUFACTURER,
        "instance_number": 1,
        "contributing_equipment": contributing_equipment(context),
    }


def prepared(source: Source) -> list[Dataset]:
    """Return the source's headers as highdicom can use them: in UTF-8, and with what it reads without asking.

    Real headers lack elements, and come in every character set. The first, of which patient and study are
    copied, is a deep copy; the others are shallow. The source itself is never changed.
    """
    thickness = _typical_gap(source)
    first, *others = source.datasets
    return [_filled(_in_utf_8(first), thickness), *(_filled(_shallow(other), thickness) for other in others)]


def put(dataset: Dataset, keyword: str, value: Any) -> None:
    """Set an element of a shallow copy: assigning to it would change the element that it shares with the original."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    dataset[tag] = DataElement(tag, dictionary_VR(tag), value)


def _shallow(original: Dataset) -> Dataset:
    copied = Dataset()
    copied.update(original)
    copied.file_meta = original.file_meta
    put(copied, "SpecificCharacterSet", "ISO_IR 192")
    return copied


def _in_utf_8(original: Dataset) -> Dataset:
    """Return a deep copy whose text is decoded by its declared character set and will be written in UTF-8."""
    copied = deepcopy(original)
    copied.decode()
    _rename(copied)
    copied.SpecificCharacterSet = "ISO_IR 192"
    return copied


def _rename(dataset: Dataset) -> None:
    """Free every person's name, at any depth, from the bytes and the character set that it came with."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _rename(item)
        elif element.VR == "PN" and element.value:
            names = [PersonName(str(name)) for name in (element.value if element.VM > 1 else [element.value])]
            element.value = names if len(names) > 1 else names[0]


def _filled(copied: Dataset, thickness: float) -> Dataset:
    for keyword in _TYPE_TWO:
        if keyword not in copied:
            put(copied, keyword, None)
    if not copied.get("SliceThickness"):
        put(copied, "SliceThickness", thickness)
    if "PerFrameFunctionalGroupsSequence" in copied:
        _share_geometry(copied)
    if copied.get("LossyImageCompression") == "01":
        _complete_lossy(copied)
    return copied


def _typical_gap(source: Source) -> float:
    """Return the distance of the first two images, mm; what a slice is taken to be thick where nothing says it."""
    places = [dataset.get("ImagePositionPatient") for dataset in source.datasets[:2]]
    if len(places) < 2 or not all(places):
        return 1.0
    return round(math.dist(places[0], places[1]), 4) or 1.0


_TYPE_TWO = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)


def _share_geometry(copied: Dataset) -> None:
    """Put what every frame says alike where highdicom looks for it: some scanners repeat it frame by frame."""
    shared = Dataset()
    shared.update((copied.get("SharedFunctionalGroupsSequence") or [Dataset()])[0])
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if keyword not in shared and keyword in copied.PerFrameFunctionalGroupsSequence[0]:
            shared[keyword] = copied.PerFrameFunctionalGroupsSequence[0][keyword]
    put(copied, "SharedFunctionalGroupsSequence", [shared])


def _complete_lossy(copied: Dataset) -> None:
    """A source that says it was compressed with loss but not how much: say so without inventing a ratio."""
    if not copied.get("LossyImageCompressionRatio") or not copied.get("LossyImageCompressionMethod"):
        for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if keyword in copied:
                del copied[keyword]
