"""Tiny CT datasets, made in memory: 16 x 16 pixels, with the UIDs, the place and the syntax that a test asks for."""

from __future__ import annotations

import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    generate_uid,
)

CT = str(CTImageStorage)
EXPLICIT = str(ExplicitVRLittleEndian)
IMPLICIT = str(ImplicitVRLittleEndian)
BIG_ENDIAN = str(ExplicitVRBigEndian)
DEFLATED = str(DeflatedExplicitVRLittleEndian)

IDENTITY = {"PatientName": "Zzyzx^Secretive", "PatientID": "ID-4711-SECRET", "AccessionNumber": "ACC-0815-SECRET"}
"""What must never be seen in a log, an event or a message."""


def uid(*parts: object) -> str:
    """Return the same UID for the same parts."""
    return str(generate_uid(entropy_srcs=[str(part) for part in parts]))


def ct(
    number: int = 1,
    *,
    study: str = "study",
    series: str = "series",
    z: float | None = None,
    announced: int | None = None,
    pixel: int = 0,
    **elements: Any,
) -> Dataset:
    """Return slice `number` (from 1) of a CT series; `pixel` changes the bytes and nothing else."""
    dataset = Dataset()
    dataset.SOPClassUID = UID(CT)
    dataset.SOPInstanceUID = UID(uid(study, series, number))
    dataset.StudyInstanceUID = UID(uid(study))
    dataset.SeriesInstanceUID = UID(uid(study, series))
    dataset.Modality = "CT"
    for keyword, value in IDENTITY.items():
        setattr(dataset, keyword, value)
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient = [-100.0, -100.0, 5.0 * number if z is None else z]
    dataset.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    dataset.PixelSpacing = [0.75, 0.75]
    dataset.SliceThickness = 5.0
    dataset.Rows = dataset.Columns = 16
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = 1
    dataset.RescaleSlope, dataset.RescaleIntercept = 1.0, -1024.0
    if announced is not None:
        dataset.NumberOfSeriesRelatedInstances = announced
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.PixelData = bytes([(pixel + step) % 251 for step in range(512)])
    dataset["PixelData"].VR = "OW"
    return dataset


def series_of(slices: int, **options: Any) -> list[Dataset]:
    """Return a whole series."""
    return [ct(number, **options) for number in range(1, slices + 1)]


def encoded(dataset: Dataset, syntax: str = EXPLICIT) -> bytes:
    """Return a dataset as it travels in a C-STORE: no file meta information."""
    buffer = DicomBytesIO()
    buffer.is_implicit_VR = syntax == IMPLICIT
    buffer.is_little_endian = syntax != BIG_ENDIAN
    write_dataset(buffer, dataset)
    plain = buffer.getvalue()
    if syntax != DEFLATED:
        return plain
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    deflated = compressor.compress(plain) + compressor.flush()
    return deflated + b"\0" * (len(deflated) % 2)


def as_file(dataset: Dataset, syntax: str = EXPLICIT) -> FileDataset:
    """Return a dataset with the file meta information that pynetdicom sends it by."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    made = FileDataset(
        BytesIO(),
        dataset,
        preamble=b"\0" * 128,
        file_meta=meta,
        is_implicit_VR=syntax == IMPLICIT,
        is_little_endian=syntax != BIG_ENDIAN,
    )
    return made


def write(dataset: Dataset, path: Path, syntax: str = EXPLICIT) -> Path:
    """Write a Part 10 file."""
    as_file(dataset, syntax).save_as(path, enforce_file_format=True)
    return path


def dataset_bytes_of(content: bytes) -> bytes:
    """Return what follows the file meta information of a Part 10 file."""
    assert content[128:132] == b"DICM"
    length = int.from_bytes(content[140:144], "little")  # (0002,0000) is always the first element
    return content[144 + length :]
