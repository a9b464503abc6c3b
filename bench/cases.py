"""What is sent, loaded and encoded: series made by script, once, in a temporary folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import UID, EnhancedCTImageStorage, ExplicitVRLittleEndian

from dicom_node.demo.phantom import Phantom, make_thorax, write_series

_VERSION = "1"  # of what is made here: another number is another folder
_DIGITS = 8  # of a UID's last component that tell copies apart
_copies = count(int.from_bytes(os.urandom(3), "big") * 100)


def cache() -> Path:
    """Return the folder of what is made once and for all runs: BENCH_CACHE, or one beside the temporary files."""
    folder = Path(os.environ.get("BENCH_CACHE", Path(tempfile.gettempdir(), "dicom-node-bench"))) / _VERSION
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def thorax(slices: int = 300, size: int = 512) -> Phantom:
    """Return the demo's thorax at the size of a chest CT: made at a quarter and half of it, and enlarged.

    `slices` must be a multiple of four, `size` of two.
    """
    coarse = make_thorax(slices=slices // 4, size=(size // 2, size // 2), spacing=(4.0, 1.4, 1.4), noise=0.0)
    hu = coarse.hu.repeat(4, 0).repeat(2, 1).repeat(2, 2)
    random = np.random.default_rng(0)
    for plane in hu:
        plane += random.normal(0.0, 20.0, plane.shape).astype(np.int16)
    along = coarse.origins[1] - coarse.origins[0]
    origins = np.concatenate([coarse.origins + along * (step - 1.5) / 4 for step in range(4)])
    order = np.argsort(origins @ along)
    return replace(
        coarse,
        hu=np.clip(hu, -1024, 3071),
        right=coarse.right.repeat(4, 0).repeat(2, 1).repeat(2, 2),
        left=coarse.left.repeat(4, 0).repeat(2, 1).repeat(2, 2),
        spacing=(1.0, 0.7, 0.7),
        origins=origins[order],
    )


def chest_ct(slices: int = 300, size: int = 512) -> list[Path]:
    """Return the files of one CT series, in slice order; by default 300 slices of 512 x 512, 157 MB."""
    folder = cache() / f"ct-{slices}-{size}"
    files = sorted(folder.glob("*.dcm"))
    if len(files) != slices:
        files = write_series(thorax(slices, size), folder)
    return files


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of files under other UIDs, in folders: one for each association that sends them."""

    folders: tuple[Path, ...]
    number: int  # of instances
    bytes: int


def copies(files: Sequence[Path], where: Path, *, associations: int, instances: int) -> Copies:
    """Write `instances` copies of `files`, dealt out over folders, as one new study with a series for each round of
    `files`; every UID keeps its length, so nothing else in a file moves. The last pixel of each image is of its study
    alone: a model may remember what it has answered.
    """
    folders = [where / f"{number:03d}" for number in range(associations)]
    for folder in folders:
        folder.mkdir(parents=True)
    study, total = next(_copies), 0
    sources = _sources(files)
    for number in range(instances):
        if number % len(files) == 0:
            series = next(_copies)
        content, study_uid, series_uid, instance_uid = sources[number % len(files)]
        content = content.replace(study_uid, _other(study_uid, study)).replace(series_uid, _other(series_uid, series))
        content = content.replace(instance_uid, _other(instance_uid, next(_copies)))
        content = content[:-2] + (study % 61 - 1000).to_bytes(2, "little", signed=True)  # HU
        (folders[number % associations] / f"{number:05d}.dcm").write_bytes(content)
        total += len(content)
    return Copies(tuple(folders), instances, total)


def _sources(files: Sequence[Path]) -> list[tuple[bytes, bytes, bytes, bytes]]:
    made = []
    for path in files:
        header = dcmread(path, stop_before_pixels=True)
        uids = (header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
        study, series, instance = (str(each).encode() for each in uids)
        made.append((path.read_bytes(), study, series, instance))
    return made


def _other(uid: bytes, number: int) -> bytes:
    """Return a UID of the same length whose last component ends in `number`."""
    return uid[:-_DIGITS] + b"%0*d" % (_DIGITS, number % 10**_DIGITS)


def multi_frame(megabytes: int, where: Path) -> Path:
    """Write an Enhanced CT object of about so many megabytes, frame by frame; return its path."""
    frame = np.random.default_rng(1).integers(-1000, 1000, (512, 512), np.int16).tobytes()
    frames = megabytes * 1_000_000 // len(frame)
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = EnhancedCTImageStorage
    base = f"2.25.{int.from_bytes(os.urandom(8), 'big')}"
    image.SOPInstanceUID, image.StudyInstanceUID, image.SeriesInstanceUID = (UID(f"{base}.{n}") for n in (1, 2, 3))
    image.Modality, image.PatientID, image.PatientName, image.NumberOfFrames = (
        "CT",
        "BENCH",
        "Bench^Multi-frame",
        frames,
    )
    image.Rows = image.Columns = 512
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation = 15, 1
    path = where / f"{megabytes}-megabytes.dcm"
    image.save_as(path, enforce_file_format=True)
    with path.open("ab") as file:
        file.write(b"\xe0\x7f\x10\x00OW\x00\x00" + (frames * len(frame)).to_bytes(4, "little"))
        for _ in range(frames):
            file.write(frame)
    return path


def chunks(files: Sequence[Path], number: int) -> Iterator[Sequence[Path]]:
    """Deal files out in `number` parts of nearly one size."""
    for part in range(number):
        yield files[part::number]
