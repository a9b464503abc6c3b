"""What every result object carries, whatever its kind: who made it, from what, and how far to trust it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom import DataElement, Dataset
from pydicom.config import RAISE
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.sr.coding import Code as PydicomCode
from pydicom.tag import Tag
from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless
from pydicom.valuerep import PersonName, validate_value

from dicom_node.errors import InputRefused
from dicom_node.findings import Code
from dicom_node.labelling import MANUFACTURER, MANUFACTURER_MODEL_NAME, Context, derive_uid
from dicom_node.source import Instance, Lazy, Source

ARTIFICIAL_INTELLIGENCE = PydicomCode("123110", "DCM", "Artificial Intelligence")
PROCESSING_EQUIPMENT = PydicomCode("109102", "DCM", "Processing Equipment")

_IDENTITY = (
    # type 2 of the Patient and General Study modules (PS3.3 C.7.1, C.7.2), copied as the source has them
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
_MORE_IDENTITY = (
    # what else of patient and study the source may state
    "IssuerOfPatientID",
    "OtherPatientIDsSequence",
    "StudyDescription",
    "ProcedureCodeSequence",
    "IssuerOfAccessionNumberSequence",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialSubjectID",
)
_IF_VALID = ("PatientAge", "PatientSize", "PatientWeight", "EthnicGroup")
_DOCUMENTS = frozenset({"SR", "KO"})
_NOT_OF_THE_IOD = {
    "PR": ("ContentDate", "ContentTime"),  # it has a Presentation Creation Date
    "RTSTRUCT": ("ContentDate", "ContentTime", "ContentQualification", "BodyPartExamined"),
}
_HAVE_LATERALITY = frozenset({"PR", "OT"})
_REFERENCES = ("ReferencedStudySequence", "ReferencedPatientSequence", "ReferencedPerformedProcedureStepSequence")
_LOSSY = frozenset({JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLSNearLossless})
_FRAMES = Tag("PerFrameFunctionalGroupsSequence")
_CODE_STRING = re.compile("[A-Z0-9_ ]{1,16}")
_OFFSET = re.compile("[+-][0-9]{4}")

Scalar = TypeVar("Scalar", bound=np.generic)


class Images(Lazy):
    """Headers of images as highdicom can use them, each made ready when it is asked for."""

    def __init__(self, originals: Sequence[Dataset], stated: Dataset, thickness: float) -> None:
        """Take the source's headers; `stated` is the first of them in UTF-8."""
        super().__init__(len(originals), {0: _filled(_shallow(stated), thickness)})
        self._originals = originals
        self._stated = stated
        self._thickness = thickness

    def original(self, number: int) -> Dataset:
        """Return a header as the source has it, which costs nothing: for a look at it, never for highdicom."""
        return self._originals[number] if number else self._stated

    def make(self, number: int) -> Dataset:
        """Make the source's header ready."""
        return self._like_the_first(_filled(_shallow(self._originals[number]), self._thickness))

    def _like_the_first(self, other: Dataset) -> Dataset:
        """Say the same: it is equal but for rounding, or they would not be one stack, and highdicom asks every bit."""
        for keyword in ("ImageOrientationPatient", "PixelSpacing"):
            if keyword in self[0]:
                put(other, keyword, self[0][keyword].value)
        return other


@dataclass(frozen=True, slots=True)
class Headers:
    """The source's headers, ready: `images` for highdicom, `stated` for patient and study as the source has them.

    Nothing in `images` identifies the patient: highdicom would log what it finds odd, and refuse what is wrong.
    `instances` has, in the same order, what is different in each image; there it costs nothing.
    """

    images: Images
    stated: Dataset
    instances: tuple[Instance, ...]


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


def complete(dataset: Dataset, headers: Headers, context: Context, *, series_offset: int) -> Dataset:
    """Fill in what highdicom leaves out; the same for every kind. Returns `dataset`."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    _identify(dataset, headers.stated)
    if dataset.Modality not in _DOCUMENTS:
        _say_body_part(dataset, headers.stated)
    _mend_what_is_broken(dataset)
    now = _local_time(context.now, dataset)
    dataset.SeriesNumber = context.series_number + series_offset
    dataset.SeriesDescription = context.series_description()
    dataset.SeriesDate = dataset.ContentDate = f"{now:%Y%m%d}"
    dataset.SeriesTime = dataset.ContentTime = f"{now:%H%M%S}"
    dataset.InstanceCreationDate, dataset.InstanceCreationTime = dataset.ContentDate, dataset.ContentTime
    dataset.Manufacturer = MANUFACTURER
    dataset.ManufacturerModelName = MANUFACTURER_MODEL_NAME
    dataset.SoftwareVersions = list(context.software_versions)
    dataset.DeviceSerialNumber = context.ae_title
    dataset.ContentQualification = context.qualification
    for keyword in _NOT_OF_THE_IOD.get(str(dataset.Modality), ()):
        dataset.pop(keyword, None)
    return dataset


def _identify(dataset: Dataset, stated: Dataset) -> None:
    """Copy patient and study word for word: an archive files the result by them, even by wrong ones."""
    for keyword in _IDENTITY:
        if keyword in stated:
            dataset[keyword] = deepcopy(stated[keyword])
    for keyword in _MORE_IDENTITY:
        if keyword in stated and not (stated[keyword].VR == "SQ" and stated[keyword].is_empty):
            dataset[keyword] = deepcopy(stated[keyword])
    for keyword in _IF_VALID:
        if keyword in stated and (stated[keyword].is_empty or _is_valid(stated[keyword])):
            dataset[keyword] = deepcopy(stated[keyword])
        elif keyword in dataset:
            del dataset[keyword]
    if _OFFSET.fullmatch(str(stated.get("TimezoneOffsetFromUTC") or "")):
        dataset.TimezoneOffsetFromUTC = stated.TimezoneOffsetFromUTC


def _is_valid(element: DataElement) -> bool:
    try:
        validate_value(element.VR, str(element.value), RAISE)
    except ValueError:
        return False
    return True


def _say_body_part(dataset: Dataset, stated: Dataset) -> None:
    """Copy Body Part Examined where it is a Code String.

    Not Laterality: validators hold that it must not be in a segmentation, where the segments' codes say the side.
    """
    body_part = str(stated.get("BodyPartExamined") or "").strip().upper()
    if _CODE_STRING.fullmatch(body_part):
        dataset.BodyPartExamined = body_part
    elif dataset.Modality in _HAVE_LATERALITY:
        dataset.Laterality = None  # type 2C: the body part may be one of a pair


def _local_time(now: datetime, dataset: Dataset) -> datetime:
    """Return `now` by the clock that the object states (PS3.3 C.12.1.1.8), else by the node's own."""
    offset = str(dataset.get("TimezoneOffsetFromUTC") or "")
    return now.astimezone(datetime.strptime(offset, "%z").tzinfo) if offset else now


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


def observer(context: Context) -> Any:
    """Return the device that observed, by its UID, name and serial number (TID 1002, 1004); no person did."""
    return hd.sr.ObserverContext(
        observer_type=hd.sr.CodedConcept("121007", "DCM", "Device"),
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=context.model.device_uid,
            name=context.ae_title,
            manufacturer_name=MANUFACTURER,
            model_name=MANUFACTURER_MODEL_NAME,
            serial_number=context.model.digest[:16],
        ),
    )


def on_frames(planes: npt.NDArray[Scalar], source: Source) -> npt.NDArray[Scalar]:
    """Return planes as highdicom wants them: one for each dataset, or for each frame of the one dataset."""
    if [frame.instance for frame in source.frames] == list(range(len(source.datasets))):
        return planes
    single = len(source.datasets) == 1
    frames = int(source.datasets[0].get("NumberOfFrames") or 1) if single else len(source.datasets)
    full = np.zeros((frames, *planes.shape[1:]), planes.dtype)
    for plane, frame in zip(planes, source.frames, strict=True):
        full[frame.frame_number - 1 if single else frame.instance] = plane
    return full


def prepared(source: Source) -> Headers:
    """Return the source's headers as highdicom can use them: in UTF-8, and with what it reads without asking.

    Real headers lack elements, have wrong ones, and come in every character set. The source itself is never changed.
    """
    stated = _in_utf_8(source.datasets[0])
    return Headers(Images(source.datasets, stated, _typical_gap(source)), stated, source.instances)


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
    """Return a deep copy whose text is decoded by its declared character set and will be written in UTF-8.

    The functional groups of thousands of frames are shared, not copied: only numbers are read from them.
    """
    frames = original.get_item(_FRAMES) if _FRAMES in original else None
    copied = deepcopy(original, {id(frames): frames})
    copied.pop(_FRAMES, None)
    _drop_unreadable(copied)
    copied.decode()
    _rename(copied)
    copied.SpecificCharacterSet = "ISO_IR 192"
    if frames is not None:
        copied[_FRAMES] = original[_FRAMES]
    return copied


def _drop_unreadable(dataset: Dataset) -> None:
    """Drop, at any depth, elements whose bytes are no value of their VR: a weight of "70,5", say."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        except Exception as error:
            # pydicom converts on access, with an exception of its own for each VR
            if (keyword := keyword_for_tag(tag)) in _IDENTITY:
                raise InputRefused(f"the source's {keyword} cannot be read: {type(error).__name__}") from error
            del dataset[tag]
            continue
        if element.VR == "SQ":
            for item in element.value:
                _drop_unreadable(item)


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
    for keyword in _IDENTITY:
        put(copied, keyword, None)
    if not copied.get("SliceThickness"):
        put(copied, "SliceThickness", thickness)
    if float(copied.get("SpacingBetweenSlices") or 1.0) <= 0:
        del copied["SpacingBetweenSlices"]  # some scanners tell the direction by its sign
    if "PerFrameFunctionalGroupsSequence" in copied:
        _share_geometry(copied)
    if not copied.get("FrameOfReferenceUID"):
        _make_frame_of_reference(copied)
    _tell_loss(copied)
    return copied


def _make_frame_of_reference(copied: Dataset) -> None:
    """Name the frame of reference of positions that come without one, the same for the whole series."""
    if "FrameOfReferenceUID" in copied:
        del copied["FrameOfReferenceUID"]
    if "ImagePositionPatient" in copied or "PerFrameFunctionalGroupsSequence" in copied:
        put(copied, "FrameOfReferenceUID", derive_uid("frame of reference", str(copied.SeriesInstanceUID)))


def _typical_gap(source: Source) -> float:
    """Return the distance of the first two images, mm; what a slice is taken to be thick where nothing says it."""
    places = [dataset.get("ImagePositionPatient") for dataset in source.datasets[:2]]
    if len(places) < 2 or not all(places):
        return 1.0
    return round(math.dist(places[0], places[1]), 4) or 1.0


def _share_geometry(copied: Dataset) -> None:
    """Put what every frame says alike where highdicom looks for it: some scanners repeat it frame by frame."""
    shared = Dataset()
    shared.update((copied.get("SharedFunctionalGroupsSequence") or [Dataset()])[0])
    for keyword in ("PixelMeasuresSequence", "PlaneOrientationSequence"):
        if keyword not in shared and keyword in copied.PerFrameFunctionalGroupsSequence[0]:
            shared[keyword] = copied.PerFrameFunctionalGroupsSequence[0][keyword]
    put(copied, "SharedFunctionalGroupsSequence", [shared])


def _tell_loss(copied: Dataset) -> None:
    """Say whether the source was compressed with loss; how much, only where the source says it (C.7.6.1.1.5)."""
    lossy = str(copied.get("LossyImageCompression") or "") in ("01", "1")
    lossy = lossy or copied.file_meta.get("TransferSyntaxUID") in _LOSSY
    put(copied, "LossyImageCompression", "01" if lossy else "00")
    known = copied.get("LossyImageCompressionRatio") and copied.get("LossyImageCompressionMethod")
    for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if keyword in copied and not (lossy and known):
            del copied[keyword]
