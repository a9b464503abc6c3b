"""A thorax made of ellipsoids, with lungs and nodules of known place and size, as a CT series.

Nothing in it is symmetric: the heart is on the left, the liver under the right lung, the right lung larger, and
pixels and slices have three different sizes. Whoever mirrors it or swaps its axes gets it wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from dicom_node.labelling import derive_uid

AIR, LUNG, FAT, TISSUE, BLOOD, BONE, NODULE = -1000.0, -850.0, -90.0, 45.0, 40.0, 450.0, 30.0
Vector = tuple[float, float, float]
NODULES: tuple[tuple[Vector, float], ...] = (
    ((-85.0, 20.0, 25.0), 12.0),
    ((-60.0, 45.0, -30.0), 20.0),
    ((80.0, 25.0, 45.0), 9.0),
)
"""Centre (x to the left, y to the back, z to the head; mm from the middle) and diameter (mm)."""

ORIENTATIONS: dict[str, tuple[Vector, Vector, Vector]] = {
    # unit vectors in which columns, rows and slices run, as patient coordinates
    "axial": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "reversed": ((1, 0, 0), (0, 1, 0), (0, 0, -1)),
    "prone": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "oblique": (
        (0.9848078, 0.1736482, 0.0),
        (-0.1710101, 0.9698463, -0.1736482),
        (-0.0301537, 0.1710101, 0.9848078),
    ),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "sagittal": ((0, 1, 0), (0, 0, -1), (1, 0, 0)),
}


@dataclass(frozen=True, slots=True)
class Nodule:
    """A sphere: centre in patient coordinates and diameter, mm."""

    centre: Vector
    diameter: float


@dataclass(frozen=True, slots=True)
class Phantom:
    """HU and truth of shape (slices, rows, columns), and where the voxels lie.

    `origins` are the patient coordinates (mm) of the first voxel of each slice; `spacing` is between slices,
    rows and columns (mm).
    """

    hu: npt.NDArray[np.int16]
    right: npt.NDArray[np.bool_]
    left: npt.NDArray[np.bool_]
    nodules: tuple[Nodule, ...]
    spacing: Vector
    row_direction: Vector  # in which the column index grows
    column_direction: Vector  # in which the row index grows
    origins: npt.NDArray[np.float64]
    seed: int


def make_thorax(
    *,
    slices: int = 56,
    size: tuple[int, int] = (160, 208),
    spacing: Vector = (5.0, 2.0, 1.7),
    nodules: Sequence[tuple[Vector, float]] = NODULES,
    orientation: str = "axial",
    tilt: float = 0.0,
    uneven: bool = False,
    noise: float = 20.0,
    seed: int = 0,
) -> Phantom:
    """Return a thorax sampled on a grid; `spacing` is between slices, rows, columns in mm, `tilt` in degrees.

    With `uneven`, every fourth gap between slices is half as wide again.
    """
    run_columns, run_rows, run_slices = (np.array(vector, float) for vector in ORIENTATIONS[orientation])
    gaps = np.full(slices, spacing[0])
    if uneven:
        gaps[::4] *= 1.5
    steps = np.cumsum(gaps) - gaps[0]
    way = run_slices + np.tan(np.radians(tilt)) * run_rows
    middle = (
        way * steps[-1] / 2 + run_rows * spacing[1] * (size[0] - 1) / 2 + run_columns * spacing[2] * (size[1] - 1) / 2
    )
    origins = steps[:, None] * way - middle
    placed = tuple(Nodule(centre, diameter) for centre, diameter in nodules)
    parts = [
        _sampled(origins + share * spacing[0] * run_slices, run_rows, run_columns, spacing, size, placed, seed)
        for share in _PARTS
    ]
    hu = np.stack([part[0] for part in parts]).mean(axis=0)
    _, right, left = parts[len(parts) // 2]
    hu += np.random.default_rng(seed).normal(0.0, noise, hu.shape).astype(np.float32)
    return Phantom(
        hu=np.asarray(np.clip(np.round(hu), -1024, 3071), np.int16),
        right=right,
        left=left,
        nodules=placed,
        spacing=spacing,
        row_direction=_vector(run_columns),
        column_direction=_vector(run_rows),
        origins=origins,
        seed=seed,
    )


Field = npt.NDArray[np.float32]
_PARTS = (-1 / 3, 0.0, 1 / 3)  # of a slice's thickness, over which it averages as a scanner does


def _sampled(
    origins: npt.NDArray[np.float64],
    run_rows: npt.NDArray[np.float64],
    run_columns: npt.NDArray[np.float64],
    spacing: Vector,
    size: tuple[int, int],
    nodules: Sequence[Nodule],
    seed: int,
) -> tuple[Field, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return HU and both lungs at the places of infinitely thin slices."""
    x, y, z = _coordinates(origins, run_rows * spacing[1], run_columns * spacing[2], size)
    hu, right, left = _tissue(x, y, z, np.random.default_rng(seed))
    for nodule in nodules:
        _blend(hu, _sphere(x, y, z, nodule, spacing), NODULE)
    return hu, right, left


def _coordinates(
    origins: npt.NDArray[np.float64],
    down: npt.NDArray[np.float64],
    across: npt.NDArray[np.float64],
    size: tuple[int, int],
) -> tuple[Field, Field, Field]:
    rows, columns = np.arange(size[0])[:, None, None], np.arange(size[1])[None, :, None]
    plane = rows * down + columns * across
    points = (origins[:, None, None, :] + plane[None]).astype(np.float32)
    return points[..., 0], points[..., 1], points[..., 2]


def _tissue(
    x: Field, y: Field, z: Field, random: np.random.Generator
) -> tuple[Field, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return HU without nodules, and the two lungs; inside means below 1."""
    skin = (x / 160) ** 2 + ((y - 5) / 108) ** 2
    wall = np.asarray((x / 138) ** 2 + ((y - 2) / 86) ** 2, np.float32)
    hu = np.full(x.shape, AIR, np.float32)
    hu[skin < 1] = FAT
    hu[wall < 1.12] = TISSUE
    hu[(np.abs(y - 128) < 4) & (np.abs(x) < 175)] = 100.0  # the table
    right = _ellipsoid(x, y, z, (-72, 3, 12), (58, 76, 118)) < 1
    left = _ellipsoid(x, y, z, (74, 6, 14), (50, 73, 112)) < 1
    heart = _ellipsoid(x, y, z, (30, -22, -22), (52, 42, 56)) < 1
    liver = _ellipsoid(x, y, z, (-58, -2, -112), (92, 84, 60)) < 1
    spleen = _ellipsoid(x, y, z, (84, 18, -112), (56, 60, 36)) < 1
    right &= ~(heart | liver)
    left &= ~(heart | spleen)
    hu[right | left] = LUNG
    hu[heart] = BLOOD
    hu[liver & (wall < 1)] = 60.0
    hu[spleen & (wall < 1)] = 50.0
    _vessels(hu, x, y, z, right, random)
    _vessels(hu, x, y, z, left, random)
    hu[(x / 17) ** 2 + ((y - 62) / 17) ** 2 < 1] = BONE
    _ribs(hu, wall, x, y, z)
    trachea = (x / 9.5) ** 2 + ((y - 12) / 8.5) ** 2
    above = z > 42
    hu[(trachea < 1.7) & above] = TISSUE
    hu[(trachea < 1) & above] = AIR
    right &= ~((trachea < 1.7) & above)
    left &= ~((trachea < 1.7) & above)
    return hu, right, left


def _ellipsoid(x: Field, y: Field, z: Field, centre: Vector, radii: Vector) -> Field:
    return np.asarray(
        ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((z - centre[2]) / radii[2]) ** 2
    )


def _vessels(hu: Field, x: Field, y: Field, z: Field, lung: npt.NDArray[np.bool_], random: np.random.Generator) -> None:
    """Draw straight tubes from the hilum outwards, thinner with the distance."""
    side = -1.0 if x[lung].mean() < 0 else 1.0
    hilum = np.array([side * 28, 10.0, 10.0])
    for _ in range(10):
        direction = random.normal(size=3) * np.array([1.0, 0.8, 1.2])
        direction[0] = side * abs(direction[0])
        direction /= np.linalg.norm(direction)
        along = (x - hilum[0]) * direction[0] + (y - hilum[1]) * direction[1] + (z - hilum[2]) * direction[2]
        away2 = (x - hilum[0]) ** 2 + (y - hilum[1]) ** 2 + (z - hilum[2]) ** 2 - along**2
        radius = np.clip(3.2 - along / 40, 0.6, 3.2)
        hu[lung & (along > 0) & (along < 85) & (away2 < radius**2)] = BLOOD


def _ribs(hu: Field, wall: Field, x: Field, y: Field, z: Field) -> None:
    shell = (wall > 1.0) & (wall < 1.1)
    hu[shell & (np.abs((z + 0.35 * np.abs(x) - 0.3 * y) % 28 - 14) < 4.5)] = BONE


def _sphere(x: Field, y: Field, z: Field, nodule: Nodule, spacing: Vector) -> Field:
    """Return how much of each voxel a nodule fills, 0 to 1, its edge as soft as the voxels are large."""
    distance = np.sqrt(_ellipsoid(x, y, z, nodule.centre, (1, 1, 1)))
    softness = float(np.mean(spacing[1:]))
    return np.clip((nodule.diameter / 2 - distance) / softness + 0.5, 0, 1)


def _blend(hu: Field, share: Field, value: float) -> None:
    hu += share * (value - hu)


def _vector(values: npt.NDArray[np.float64]) -> Vector:
    return float(values[0]), float(values[1]), float(values[2])


# -- as DICOM -----------------------------------------------------------------------------------------------------


def write_series(phantom: Phantom, folder: Path, *, study: str = "", series: str = "") -> list[Path]:
    """Write a phantom as CT Image Storage objects, one file for each slice; return their paths in slice order.

    UIDs follow from the seed and the voxels: the same phantom is the same study. `study` and `series` name others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = f"{phantom.seed} {phantom.hu.shape} {phantom.spacing} {phantom.row_direction} {phantom.origins[0]}"
    study_uid = study or derive_uid("phantom study", identity)
    series_uid = series or derive_uid("phantom series", study_uid, identity)
    return [_write_slice(phantom, number, folder, study_uid, series_uid) for number in range(len(phantom.hu))]


def _write_slice(phantom: Phantom, number: int, folder: Path, study_uid: str, series_uid: str) -> Path:
    image = _patient_and_study(study_uid)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = UID(derive_uid("phantom instance", series_uid, str(number)))
    _fill_series(image, series_uid, phantom.seed)
    _fill_image(image, phantom, number)
    path = folder / f"{number:04d}.dcm"
    image.save_as(path, enforce_file_format=True)
    return path


def _patient_and_study(study_uid: str) -> Dataset:
    image = Dataset()
    image.SpecificCharacterSet = "ISO_IR 100"
    image.PatientName = "PHANTOM^THORAX"
    image.PatientID = "PHANTOM-1"
    image.PatientBirthDate = "19700101"
    image.PatientSex = "O"
    image.StudyInstanceUID = study_uid
    image.StudyID = "1"
    image.StudyDate, image.StudyTime = "20260102", "101500"
    image.StudyDescription = "Thorax phantom"
    image.AccessionNumber = "PHANTOM"
    image.ReferringPhysicianName = ""
    return image


def _fill_series(image: Dataset, series_uid: str, seed: int) -> None:
    image.Modality = "CT"
    image.SeriesInstanceUID = series_uid
    image.SeriesNumber = 2
    image.SeriesDate, image.SeriesTime = image.StudyDate, image.StudyTime
    image.SeriesDescription = f"Phantom {seed}"
    image.BodyPartExamined = "CHEST"
    image.PatientPosition = "HFS"
    image.Manufacturer = "phantom"
    image.ManufacturerModelName = "thorax"
    image.FrameOfReferenceUID = derive_uid("phantom frame of reference", series_uid)
    image.PositionReferenceIndicator = ""
    image.KVP = "120"


def _fill_image(image: Dataset, phantom: Phantom, number: int) -> None:
    values = phantom.hu[number]
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.InstanceNumber = number + 1
    image.AcquisitionNumber = 1
    image.ContentDate, image.ContentTime = image.StudyDate, image.StudyTime
    image.AcquisitionDate, image.AcquisitionTime = image.StudyDate, image.StudyTime
    image.ImageOrientationPatient = [round(v, 7) for v in (*phantom.row_direction, *phantom.column_direction)]
    image.ImagePositionPatient = [round(float(v), 4) for v in phantom.origins[number]]
    image.PixelSpacing = [phantom.spacing[1], phantom.spacing[2]]
    image.SliceThickness = phantom.spacing[0]
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows, image.Columns = values.shape
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.RescaleIntercept, image.RescaleSlope, image.RescaleType = "0", "1", "HU"
    image.WindowCenter, image.WindowWidth = "-600", "1500"
    image.PixelData = values.astype("<i2").tobytes()


def dice(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Return the overlap of two masks, 0 to 1."""
    total = int(first.sum()) + int(second.sum())
    return 2.0 * int((first & second).sum()) / max(1, total)
