"""Small asymmetric series in every geometry, a prediction on each, and the result objects made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian

from dicom_node.catalogue import default_folder, read_model
from dicom_node.demo.phantom import Phantom, make_thorax, write_series
from dicom_node.findings import Findings
from dicom_node.labelling import Context, ModelIdentity, derive_uid
from dicom_node.manifest import Manifest
from dicom_node.results import Result, encode_all
from dicom_node.selfcheck import require_sound
from workers.findings_of import findings_of
from workers.prediction import Detection, Prediction
from workers.volume import Volume, load

SMALL = {"slices": 14, "size": (40, 52), "spacing": (20.0, 8.0, 6.8), "noise": 0.0}

GEOMETRIES = {
    "axial": {},
    "reversed": {"orientation": "reversed"},
    "prone": {"orientation": "prone"},
    "oblique": {"orientation": "oblique"},
    "coronal": {"orientation": "coronal"},
    "sagittal": {"orientation": "sagittal"},
    "tilted": {"tilt": 18.5},
    "uneven": {"uneven": True},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One series with its results."""

    phantom: Phantom
    paths: list[Path]
    volume: Volume
    findings: Findings
    context: Context
    results: list[Result]

    def of(self, kind: str) -> list[Dataset]:
        return [result.dataset for result in self.results if result.kind == kind]

    def written(self, folder: Path) -> list[Path]:
        """Write every result to a folder, named after its kind and number."""
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for result in self.results:
            path = folder / f"{result.kind}-{result.dataset.SeriesNumber}.dcm"
            result.dataset.save_as(path, enforce_file_format=True)
            written.append(path)
        return written


def manifest(*, organs: bool = True, nodules: bool = True) -> Manifest:
    """Return one manifest with the outputs of both models that come with the node."""
    lung = read_model(default_folder() / "ct_lung").manifest
    nodule = read_model(default_folder() / "ct_lung_nodule").manifest
    outputs = lung.outputs.model_copy(
        update={
            "segments": lung.outputs.segments if organs else {},
            "detections": nodule.outputs.detections if nodules else {},
        }
    )
    return lung.model_copy(update={"outputs": outputs})


def context(**changes: object) -> Context:
    made = Context(
        model=ModelIdentity("ct_lung", "1.0.0", "Lungs", "dicom-node", "ab" * 32),
        input_digest="cd" * 32,
        now=datetime(2026, 11, 22, 14, 30, 5, tzinfo=UTC),
    )
    return replace(made, **changes)


def predict(volume: Volume, *, organs: bool = True, outline: bool = True, found: bool = True) -> Prediction:
    """Return boxes where no mirror image of them is: right lung low in front, left lung high behind, one nodule."""
    shape = volume.grid.values.shape
    k, j, i = shape
    labels = np.zeros(shape, np.uint8)
    labels[1 : k // 2, 2 : j // 2, 1 : i // 3] = 1
    labels[k // 3 : k - 1, j // 3 : j - 2, i // 2 + 1 : i - 2] = 2
    instances = np.zeros(shape, np.uint16)
    box = ((2, 5), (3, 7), (2, 6))
    if outline:
        instances[2:5, 3:7, 2:6] = 9
        instances[3, 3:8, 2:6] = 9
        box = ((2, 5), (3, 8), (2, 6))
    detection = Detection(
        "nodule", box, (3.0, 5.0, 4.0), 0.83, 9 if outline else None, "right", {"volume": 812.3, "diameter": 11.58}
    )
    return Prediction(
        labels=labels if organs else None,
        instances=instances if found and outline else None,
        detections=(detection,) if found else (),
        parameters={"threshold": "0.5"},
    )


def make_case(
    folder: Path,
    geometry: str = "axial",
    *,
    organs: bool = True,
    nodules: bool = True,
    found: bool = True,
    outline: bool = True,
    edit=None,
    **changes: object,
) -> Case:
    """Write a series, load it with its files in an order of no meaning, and encode a prediction on it."""
    phantom = make_thorax(**{**SMALL, **GEOMETRIES[geometry]}, seed=7)
    paths = write_series(phantom, folder / geometry)
    for path in paths if edit else ():
        dataset = dcmread(path)
        edit(dataset)
        dataset.save_as(path, enforce_file_format=True)
    return encode_case(phantom, paths, organs=organs, nodules=nodules, found=found, outline=outline, **changes)


def encode_case(phantom, paths, *, organs=True, nodules=True, found=True, outline=True, **changes) -> Case:
    shuffled = [paths[n] for n in np.random.default_rng(3).permutation(len(paths))]
    volume = load(shuffled)
    made = context(**changes)
    prediction = predict(volume, organs=organs, found=found and nodules, outline=outline)
    findings = findings_of(prediction, volume, manifest(organs=organs, nodules=nodules), made)
    results = encode_all(("seg", "sr"), findings, volume.source, made)
    require_sound([encoded(result.dataset) for result in results], volume.source)
    return Case(phantom, paths, volume, findings, made, results)


def encoded(dataset: Dataset) -> bytes:
    """Return a Part 10 file."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def point_of(volume: Volume, voxel: tuple[int, int, int]) -> npt.NDArray[np.float64]:
    """Return the patient coordinates (mm) of a voxel of the canonical grid, from the grid's own geometry."""
    grid = volume.grid
    point = grid.origins[voxel[grid.stack]].copy()
    for axis, index in enumerate(voxel):
        if axis != grid.stack:
            point += grid.directions[axis] * grid.spacing[axis] * index
    return point


def enhanced_from(paths: list[Path], folder: Path) -> Path:
    """Return one Enhanced CT object with the slices of a classic series as frames, in an order of no meaning."""
    slices = [dcmread(path) for path in paths]
    order = np.random.default_rng(5).permutation(len(slices))
    first = slices[0]
    enhanced = Dataset()
    for keyword in (
        *("SpecificCharacterSet", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID"),
        *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "Modality"),
        *("SeriesNumber", "FrameOfReferenceUID", "PositionReferenceIndicator", "Rows", "Columns", "SamplesPerPixel"),
        *("PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    ):
        enhanced[keyword] = first[keyword]
    enhanced.file_meta = FileMetaDataset()
    enhanced.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    enhanced.SOPClassUID = EnhancedCTImageStorage
    enhanced.SOPInstanceUID = derive_uid("enhanced", str(first.SOPInstanceUID))
    enhanced.SeriesInstanceUID = derive_uid("enhanced series", str(first.SOPInstanceUID))
    enhanced.InstanceNumber = 1
    enhanced.NumberOfFrames = len(slices)
    enhanced.SharedFunctionalGroupsSequence = [Dataset()]
    enhanced.PerFrameFunctionalGroupsSequence = [_frame(slices[n]) for n in order]
    enhanced.PixelData = b"".join(slices[n].PixelData for n in order)
    path = folder / "enhanced.dcm"
    enhanced.save_as(path, enforce_file_format=True)
    return path


def _frame(image: Dataset) -> Dataset:
    frame = Dataset()
    for sequence, keywords in {
        "PlanePositionSequence": ("ImagePositionPatient",),
        "PlaneOrientationSequence": ("ImageOrientationPatient",),
        "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
        "PixelValueTransformationSequence": ("RescaleIntercept", "RescaleSlope", "RescaleType"),
    }.items():
        item = Dataset()
        for keyword in keywords:
            item[keyword] = image[keyword]
        setattr(frame, sequence, [item])
    return frame
