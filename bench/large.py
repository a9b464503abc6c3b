"""What the largest segmentations cost in memory, in a process of its own: `python -m bench.large SLICES STRUCTURES`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from bench.measure import Figure
from dicom_node.findings import Code, Findings, Segment
from dicom_node.forms import Form, SegmentationType
from dicom_node.labelling import Context, ModelIdentity, derive_uid
from dicom_node.results import encode_all
from dicom_node.results.pieces import pieces
from dicom_node.selfcheck import require_sound
from dicom_node.source import Source, SourceFrame
from dicom_node.spool import Spool

_SIDE = 512
_KIND = Code("123037004", "SCT", "Anatomical Structure")
_ORGAN = Code("39607008", "SCT", "Lung")
_MOST = 300.0  # MB beyond the labels and the functional groups


def figures(*, quick: bool) -> list[Figure]:
    """Return how much memory 100 structures need, each on every one of 1,000 slices, beyond their labels."""
    slices, structures = (40, 10) if quick else (1000, 100)
    made = []
    for kind in ("BINARY", "LABELMAP"):
        told = measured(slices, structures, kind)
        note = (
            f"{told['frames']} frames, a file of {told['megabytes']:.0f} MB, {told['seconds']:.1f} s of processor; "
            f"functional groups of {told['groups']:.0f} MB are part of it"
        )
        limit = _MOST + 3 * float(told["groups"])
        name = f"memory: {kind} of {structures} structures on {slices} slices, with its report"
        made.append(Figure(name, "MB", told["peak"], limit=limit, note=note))
    return made


def measured(slices: int, structures: int, kind: str) -> Mapping[str, Any]:
    """Run `told` in a process of its own."""
    command = [sys.executable, "-m", "bench.large", str(slices), str(structures), kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: Mapping[str, Any] = json.loads(done.stdout)
    return result


def told(slices: int, structures: int, kind: SegmentationType, folder: Path) -> Mapping[str, Any]:
    """Write a segmentation and its report into a spool; return what that took of this process, in MB and seconds."""
    spool = Spool(folder)
    made_by, form = context(), Form(kind)
    write(_source(4), findings(_mask(4, 2), 2), made_by, form, spool)  # everything is imported and every table read
    source, found = _source(slices), findings(_mask(slices, structures), structures)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    began = time.process_time()
    size, frames, groups = write(source, found, made_by, form, spool)
    return {
        "peak": _resident("VmHWM") - before,
        "seconds": time.process_time() - began,
        "megabytes": size / 1e6,
        "frames": frames,
        "groups": groups / 1e6,
    }


def write(source: Source, found: Findings, made_by: Context, form: Form, spool: Spool) -> tuple[int, int, int]:
    """Write a SEG and an SR as a worker does; return the SEG's bytes, frames, and bytes of functional groups."""
    results = encode_all(["seg", "sr"], found, source, made_by, [form])
    with ExitStack() as stack:
        drafts = [stack.enter_context(spool.draft(pieces(result.dataset))) for result in results]
        require_sound([draft.path for draft in drafts], source)
        for result, draft in zip(results, drafts, strict=True):
            spool.keep_draft(str(result.dataset.SOPInstanceUID), draft)
    segmentation = results[0].dataset
    groups = segmentation.get_item("PerFrameFunctionalGroupsSequence").value
    return drafts[0].size, int(segmentation.NumberOfFrames), len(groups)


def findings(mask: npt.NDArray[np.uint8], count: int) -> Findings:
    """Return `count` structures, the values 1 to `count` of a mask."""
    segments = tuple(
        Segment(0, n, f"Organ {n}", _KIND, _ORGAN, (n * 2 % 256, 90, 70), f"organ {n}", derive_uid(f"organ {n}"))
        for n in range(1, count + 1)
    )
    return Findings((mask,), segments)


def context() -> Context:
    """Return the maker of what is encoded here."""
    model = ModelIdentity("by_hand", "1.0.0", "By hand", "bench", digest="0" * 64)
    return Context(model, input_digest="0" * 64, now=datetime.now(UTC))


def _mask(slices: int, structures: int) -> npt.NDArray[np.uint8]:
    """Return labels that are on every slice, in tiles of one size."""
    across = int(np.ceil(np.sqrt(structures)))
    tiles = np.arange(_SIDE) * across // _SIDE
    plane = (tiles[:, None] * across + tiles[None, :] + 1).astype(np.uint8)
    plane[plane > structures] = 0
    return np.repeat(plane[None], slices, axis=0)


def _source(slices: int) -> Source:
    images = tuple(_image(number) for number in range(slices))
    return Source(images, tuple(SourceFrame(number) for number in range(slices)))


def _image(number: int) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, derive_uid("large", str(number))
    made.StudyInstanceUID, made.SeriesInstanceUID = derive_uid("large study"), derive_uid("large series")
    made.FrameOfReferenceUID, made.Modality, made.PatientID = derive_uid("large frame"), "CT", "BENCH"
    for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"):
        setattr(made, keyword, None)
    made.AccessionNumber = made.ReferringPhysicianName = None
    made.InstanceNumber, made.ImagePositionPatient = number + 1, [0, 0, number]
    made.ImageOrientationPatient, made.PixelSpacing, made.SliceThickness = [1, 0, 0, 0, 1, 0], [0.7, 0.7], 1
    made.Rows = made.Columns = _SIDE
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit, made.PixelRepresentation = 15, 1
    return made


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(told(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(scratch))))  # type: ignore[arg-type]
