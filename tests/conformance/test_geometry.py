"""A mask comes back voxel for voxel, at the right point of the patient, whatever the series looks like."""

from __future__ import annotations

import subprocess
from io import BytesIO

import highdicom as hd
import numpy as np
import pytest
from pydicom import dcmread

from tests.conformance.cases import GEOMETRIES, encode_case, encoded, enhanced_from, point_of


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_grid_runs_to_head_back_and_left(case_of, geometry):
    case = case_of(geometry)

    directions = case.volume.grid.directions

    assert directions[0, 2] > 0.7, "axis k runs to the head"
    assert directions[1, 1] > 0.7, "axis j runs to the back"
    assert directions[2, 0] > 0.7, "axis i runs to the left"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_voxel_of_the_grid_is_the_pixel_of_the_source_at_the_same_point(case_of, geometry):
    case = case_of(geometry)
    volume = case.volume
    numbers = np.arange(volume.grid.values.size, dtype=np.int64).reshape(volume.grid.values.shape)
    on_source = volume.to_source(numbers)

    for voxel in [(0, 0, 0), (3, 5, 7), tuple(size - 1 for size in numbers.shape)]:
        frame, row, column = (int(found[0]) for found in np.nonzero(on_source == numbers[voxel]))
        image = volume.source.dataset_of(frame)
        orientation = np.array(image.ImageOrientationPatient, float)
        point = (
            np.array(image.ImagePositionPatient, float)
            + orientation[:3] * float(image.PixelSpacing[1]) * column
            + orientation[3:] * float(image.PixelSpacing[0]) * row
        )
        np.testing.assert_allclose(point_of(volume, voxel), point, atol=1e-3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_values_of_the_grid_are_those_of_the_source(case_of, geometry):
    case = case_of(geometry)

    np.testing.assert_array_equal(case.volume.to_source(case.volume.grid.values), _sorted_hu(case))


def _sorted_hu(case):
    """The phantom's slices in the order of the volume's frames."""
    number = {str(dcmread(path).SOPInstanceUID): n for n, path in enumerate(case.paths)}
    order = [number[case.volume.source.dataset_of(frame).SOPInstanceUID] for frame in range(len(case.paths))]
    return case.phantom.hu[order]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_right_lung_is_on_the_right(case_of, geometry):
    """The phantom's right lung has negative x in the patient, however the pixels lie."""
    case = case_of(geometry)
    truth = case.phantom.right[[int(path.stem) for path in case.paths]]
    order = [
        [str(dcmread(path).SOPInstanceUID) for path in case.paths].index(
            case.volume.source.dataset_of(frame).SOPInstanceUID
        )
        for frame in range(len(case.paths))
    ]

    columns = np.zeros(case.volume.grid.values.shape, bool)
    for voxel in np.ndindex(columns.shape):
        columns[voxel] = voxel[2] < columns.shape[2] / 2
    right_half = case.volume.to_source(columns)

    assert (truth[order] & right_half).sum() > 0.95 * truth.sum()


def as_highdicom_reads(segmentation):
    """As it is in its file: its pixels are made while it is written."""
    return hd.seg.Segmentation.from_dataset(dcmread(BytesIO(encoded(segmentation))))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_highdicom_reads_the_mask_back_slice_by_slice(case_of, geometry):
    case = case_of(geometry)

    for segmentation, labels in zip(case.of("seg"), case.findings.labels, strict=True):
        read = as_highdicom_reads(segmentation).get_pixels_by_source_instance(
            [str(case.volume.source.dataset_of(frame).SOPInstanceUID) for frame in range(len(labels))],
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
        np.testing.assert_array_equal(read, labels)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_frame_lies_where_its_source_image_lies(case_of, geometry):
    case = case_of(geometry)
    positions = {str(d.SOPInstanceUID): np.array(d.ImagePositionPatient, float) for d in case.volume.source.datasets}

    for segmentation in case.of("seg"):
        for frame in segmentation.PerFrameFunctionalGroupsSequence:
            (derivation,) = frame.DerivationImageSequence
            (source,) = derivation.SourceImageSequence
            place = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
            np.testing.assert_allclose(place, positions[source.ReferencedSOPInstanceUID], atol=1e-3)


@pytest.mark.peer("segimage2itkimage")
@pytest.mark.parametrize("geometry", ["axial", "reversed", "prone", "oblique", "coronal", "sagittal"])
def test_dcmqi_reads_the_mask_back_at_the_right_points(case_of, tmp_path, tool, geometry):
    """The reader of 3D Slicer: each voxel of each segment, compared as a point of the patient."""
    case = case_of(geometry)
    seg, *_ = case.written(tmp_path / "results")

    done = subprocess.run(
        [tool("segimage2itkimage"), "--inputDICOM", seg, "--outputDirectory", tmp_path, "-t", "nrrd", "-p", "mask"],
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    for number, value in enumerate((1, 2), start=1):
        read = _nrrd_points(tmp_path / f"mask-{number}.nrrd")
        wanted = np.array([point_of(case.volume, voxel) for voxel in np.argwhere(_canonical(case, value))])
        assert len(read) == len(wanted)
        np.testing.assert_allclose(_sorted(read), _sorted(wanted), atol=0.02)


def _canonical(case, value):
    """The label array on the canonical grid again."""
    volume = case.volume
    numbers = np.arange(volume.grid.values.size).reshape(volume.grid.values.shape)
    return np.isin(numbers, volume.to_source(numbers)[case.findings.labels[0] == value])


def _sorted(points):
    rounded = np.round(points, 1) + 0.0
    return points[np.lexsort(rounded.T)]


def _nrrd_points(path):
    """The patient coordinates (LPS, mm) of every voxel of a gzipped NRRD that is not 0."""
    import gzip

    head, _, data = path.read_bytes().partition(b"\n\n")
    fields = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:] if ": " in line)
    sizes = [int(size) for size in fields["sizes"].split()]
    vectors = [[float(v) for v in vector.strip("() ").split(",")] for vector in fields["space directions"].split(") (")]
    origin = np.array([float(v) for v in fields["space origin"].strip("()").split(",")])
    raw = gzip.decompress(data) if fields["encoding"] == "gzip" else data
    kind = {"short": "<i2", "unsigned char": "u1", "uint8": "u1", "int16": "<i2"}[fields["type"]]
    voxels = np.frombuffer(raw, kind).reshape(sizes[::-1])
    assert fields["space"] == "left-posterior-superior"
    return origin + np.argwhere(voxels)[:, ::-1] @ np.array(vectors)


def test_an_enhanced_object_with_shuffled_frames_is_the_same_volume(case_of, tmp_path):
    classic = case_of("axial")
    path = enhanced_from(classic.paths, tmp_path)

    case = encode_case(classic.phantom, [path])

    np.testing.assert_array_equal(case.volume.grid.values, classic.volume.grid.values)
    for segmentation, labels in zip(case.of("seg"), case.findings.labels, strict=True):
        frames = [frame.frame_number for frame in case.volume.source.frames]
        read = as_highdicom_reads(segmentation).get_pixels_by_source_frame(
            str(case.volume.source.datasets[0].SOPInstanceUID),
            frames,
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
        np.testing.assert_array_equal(read, labels)


def test_a_shift_by_one_slice_would_be_noticed(case_of):
    """The control of the tests above: they compare places, not shapes."""
    case = case_of("axial")
    labels = case.findings.labels[0]

    assert not np.array_equal(np.roll(labels, 1, axis=0), labels)
    assert not np.array_equal(labels[:, :, ::-1], labels)
    assert not np.array_equal(labels[:, ::-1], labels)


@pytest.mark.parametrize(
    "name", ["chest_ct_lung_dx_a0001", "head_ct_ge_tilted", "head_mr_t1_sagittal", "enhanced_mr_t1"]
)
def test_real_series_become_volumes_and_masks_come_back(shared_data, name):
    paths = sorted((shared_data / name / "series").glob("*.dcm"))

    case = encode_case(None, paths)

    frames = case.volume.source.frames
    for segmentation, labels in zip(case.of("seg"), case.findings.labels, strict=True):
        read = as_highdicom_reads(segmentation)
        arguments = {
            "combine_segments": True,
            "ignore_spatial_locations": True,
            "assert_missing_frames_are_empty": True,
        }
        if len(paths) == 1:
            numbers = [frame.frame_number for frame in frames]
            uid = str(case.volume.source.datasets[0].SOPInstanceUID)
            back = read.get_pixels_by_source_frame(uid, numbers, **arguments)
        else:
            uids = [str(case.volume.source.dataset_of(frame).SOPInstanceUID) for frame in range(len(frames))]
            back = read.get_pixels_by_source_instance(uids, **arguments)
        np.testing.assert_array_equal(back, labels)
