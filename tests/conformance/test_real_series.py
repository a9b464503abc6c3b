"""Results on real series: nothing to complain about that the source has not brought with it."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from collections import Counter

import numpy as np
import pytest
from highdicom.sr import srread
from pydicom import dcmread

from dicom_node.forms import Form
from dicom_node.results import ORDER, encode_all
from dicom_node.selfcheck import require_sound
from tests.conformance.cases import encode_case, encoded
from tests.conformance.test_kinds import KNOWN, with_map
from tests.conformance.test_results import complaints

SERIES = ["chest_ct_lung_dx_a0001", "head_ct_ge_tilted", "head_mr_t1_sagittal", "enhanced_mr_t1"]

pytestmark = [
    pytest.mark.data,
    # real headers hold values that are too long or of a wrong form
    pytest.mark.filterwarnings("ignore::UserWarning:pydicom"),
]


@pytest.fixture(scope="module", params=SERIES)
def real(request, shared_data, tmp_path_factory):
    """A real series, results of a made-up prediction on it, and their files."""
    paths = sorted((shared_data / request.param / "series").glob("*.dcm"))
    case = encode_case(None, paths)
    return case, case.written(tmp_path_factory.mktemp(request.param))


@pytest.mark.peer("dciodvfy")
def test_dciodvfy_says_nothing_that_it_does_not_say_of_the_source(real, tool):
    case, written = real
    inherited = set(complaints(tool("dciodvfy"), case.paths[0]))

    for path in written:
        assert set(complaints(tool("dciodvfy"), path)) <= inherited


@pytest.mark.peer("dcentvfy")
def test_dcentvfy_finds_no_error_that_the_source_has_not(real, tool):
    case, written = real
    before = errors(tool("dcentvfy"), case.paths)

    assert errors(tool("dcentvfy"), [*case.paths, *written]) - before == Counter()


@pytest.mark.peer("dciodvfy")
def test_every_other_kind_is_valid_and_sound_as_well(real, tool, tmp_path):
    case, _ = real
    source = case.volume.source
    findings = with_map(case.findings, source)
    inherited = set(complaints(tool("dciodvfy"), case.paths[0]))
    forms = (Form("LABELMAP"), Form("BINARY", 3))

    results = encode_all(ORDER, findings, source, case.context, forms)

    for form in forms:
        require_sound([encoded(one.dataset) for one in results if one.form in (None, form.key)], source)
    for number, result in enumerate(results):
        path = tmp_path / f"{number}-{result.kind}.dcm"
        result.dataset.save_as(path, enforce_file_format=True)
        found = set(complaints(tool("dciodvfy"), path)) - inherited
        assert not [line for line in found if not any(known in line for known in KNOWN)], path.name


def errors(tool, paths):
    return Counter(line for line in complaints(tool, *paths) if line.startswith("Error"))


@pytest.mark.peer("segimage2itkimage")
def test_dcmqi_reads_as_many_voxels_of_each_segment(real, tool, tmp_path):
    case, written = real
    segmentations = [path for path in written if path.name.startswith("seg")]

    for layer, path in enumerate(segmentations):
        folder = tmp_path / str(layer)
        folder.mkdir()
        done = subprocess.run(
            [tool("segimage2itkimage"), "--inputDICOM", path, "--outputDirectory", folder, "-t", "nrrd", "-p", "m"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        if "outside image geometry" in done.stderr and "tilted" in str(case.paths[0]):
            pytest.xfail("dcmqi knows no sheared grid: it fails on slices of a tilted gantry, with exit code 0")
        assert "ERROR" not in done.stderr
        assert "type 2" not in done.stderr
        for number, segment in enumerate(case.findings.segments_of(layer), start=1):
            assert voxels(folder / f"m-{number}.nrrd") == (case.findings.labels[layer] == segment.value).sum()


def voxels(path) -> int:
    head, _, data = path.read_bytes().partition(b"\n\n")
    raw = gzip.decompress(data) if b"encoding: gzip" in head else data
    kind = "<i2" if re.search(rb"type: (short|int16)", head) else "u1"
    return int(np.count_nonzero(np.frombuffer(raw, kind)))


@pytest.mark.peer("tid1500reader")
def test_dcmqi_reads_every_group_of_the_report(real, tool, tmp_path):
    case, written = real
    output = tmp_path / "read.json"

    subprocess.run([tool("tid1500reader"), "--inputDICOM", written[-1], "--outputMetadata", output], check=True)

    measured = [group for group in json.loads(output.read_text())["Measurements"] if group["measurementItems"]]
    assert {group["TrackingIdentifier"] for group in measured} == {
        segment.label for segment in case.findings.segments if segment.measurements
    }


def test_every_reference_leads_to_an_image_or_a_segment_that_is_there(real):
    case, written = real
    datasets = [dcmread(path) for path in [*case.paths, *written]]
    known = {str(dataset.SOPInstanceUID): int(dataset.get("NumberOfFrames") or 1) for dataset in datasets}
    segments = {str(dataset.SOPInstanceUID): len(dataset.get("SegmentSequence", ())) for dataset in datasets}

    for path in written:
        for reference in references(dcmread(path)):
            uid = str(reference.ReferencedSOPInstanceUID)
            assert uid in known
            assert int(reference.get("ReferencedSegmentNumber") or 0) <= segments[uid]
            assert int(reference.get("ReferencedFrameNumber") or 1) <= known[uid]


def references(dataset, keyword=None):
    """Every reference by the node itself: those to other studies come with the source."""
    if "ReferencedSOPInstanceUID" in dataset and keyword in ("ReferencedSOPSequence", "ReferencedInstanceSequence"):
        yield dataset
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                yield from references(item, element.keyword)


def test_every_box_lies_on_its_image_and_in_its_segment_s_place(real):
    case, written = real

    groups = srread(written[-1]).content.get_planar_roi_measurement_groups()

    assert len(groups) == len(case.findings.segments)
    for group in groups:
        points = group.roi.value
        image = group.roi.ContentSequence[0].ReferencedSOPSequence[0]
        rows, columns = case.volume.source.datasets[0].Rows, case.volume.source.datasets[0].Columns
        assert (points >= 0).all()
        assert (points <= (columns, rows)).all()
        segment = next(s for s in case.findings.segments if s.tracking_uid == group.tracking_uid)
        frame = next(
            index
            for index, place in enumerate(case.volume.source.frames)
            if case.volume.source.dataset_of(index).SOPInstanceUID == image.ReferencedSOPInstanceUID
            and place.frame_number == int(image.get("ReferencedFrameNumber") or 1)
        )
        mask = case.findings.labels[segment.layer][frame] == segment.value
        assert covered(mask, points) == mask.sum() > 0
        for step in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            assert covered(mask, points + step) < mask.sum(), "a box one pixel off would be noticed"


def covered(mask, points):
    """How many pixels of the mask lie in the box, by its corners in DICOM image coordinates."""
    (left, top), (right, bottom) = np.clip(points[[0, 2]], 0, None).astype(int)
    return mask[top:bottom, left:right].sum()
