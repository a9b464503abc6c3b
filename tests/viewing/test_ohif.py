"""What a radiologist sees in OHIF: the viewer's own state and the pixels on the screen, both against the truth."""

from __future__ import annotations

import http.client
import re
from dataclasses import replace

import highdicom as hd
import numpy as np
import pytest
from pydicom import dcmread

from dicom_node.config import DeliveryTable, Peer
from dicom_node.delivery.cstore import Parcel, deliver
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.findings import Finding
from dicom_node.forms import Form
from dicom_node.plane import in_patient
from dicom_node.results import encode_all
from dicom_node.results.layers import Layers
from tests.acceptance.stand import storescu, wait_for
from tests.conformance.cases import SMALL, encode_case
from tests.viewing.conftest import Stand

pytestmark = [
    pytest.mark.peer("Orthanc"),
    pytest.mark.peer("chromium"),
    pytest.mark.peer("npm"),
    pytest.mark.timeout(300),
]

_COLOURED = 25  # how far a pixel's channels must spread apart to count as coloured, of 255
_TOLERANCE = 6  # of a colour: it goes through CIELab in 16 bits and back


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """An asymmetric series with its results as bits and as a label map.

    Its pixels are square: OHIF 3.13.2 takes the one spacing for the other where it places an SR's coordinates.
    """
    phantom = make_thorax(**{**SMALL, "spacing": (20.0, 7.0, 7.0)}, seed=7)
    made = encode_case(phantom, write_series(phantom, tmp_path_factory.mktemp("case")))
    label_maps = encode_all(("seg", "sr"), made.findings, made.volume.source, made.context, (Form("LABELMAP"),))
    return replace(made, results=[*made.results, *label_maps])


@pytest.fixture(scope="module")
def shown(stand, case, tmp_path_factory):
    """The stand, with the case in its PACS."""
    peer = Peer(ae_title="ORTHANC", host="127.0.0.1", port=stand.dicom_port)
    folder = tmp_path_factory.mktemp("results")
    parcels = [Parcel.of_file(path) for path in case.paths]
    for number, result in enumerate(case.results):
        path = folder / f"{number}.dcm"
        result.dataset.save_as(path, enforce_file_format=True)
        parcels.append(Parcel.of_file(path))
    deliver(parcels, peer, ae_title="SCANNER", timing=DeliveryTable())
    return stand


def of(case, kind, form):
    return [result.dataset for result in case.results if (result.kind, result.form) == (kind, form)]


def truth(case):
    """Label -> (voxels, colour) of the organs."""
    return {
        segment.label: (int((case.findings.labels[0] == segment.value).sum()), segment.colour)
        for segment in case.findings.segments_of(0)
    }


def faults_of_state(segmentations, expected):
    """What is wrong with the segments that the viewer holds: names, numbers of voxels, colours."""
    faults = []
    held = {segment["label"]: segment for segment in segmentations}
    for label, (voxels, colour) in expected.items():
        if label not in held:
            faults.append(f"{label} is not there")
            continue
        if held[label]["voxels"] != voxels:
            faults.append(f"{label} has {held[label]['voxels']} voxels of {voxels}")
        if max(abs(one - two) for one, two in zip(held[label]["colour"], colour, strict=True)) > _TOLERANCE:
            faults.append(f"{label} is {held[label]['colour']}, not {colour}")
    return faults


def sampled(viewer, case, frame, control, picture):
    """For each voxel of a frame how much more coloured its centre has become, `(rows, columns, 3)`."""
    header = case.volume.source.header_of(frame)
    rows, columns = int(header.Rows), int(header.Columns)
    corners = in_patient(np.array([[0.5, 0.5], [columns - 0.5, 0.5], [0.5, rows - 0.5]]), header)
    first, right, down = (np.array(viewer.place_on_canvas(corner.tolist())) for corner in corners)
    grid = (
        first
        + np.arange(columns)[None, :, None] * (right - first) / (columns - 1)
        + np.arange(rows)[:, None, None] * (down - first) / (rows - 1)
    )
    places = np.round(grid).astype(int)
    x, y = places[..., 0], places[..., 1]
    inside = (x >= 0) & (y >= 0) & (x < picture.shape[1]) & (y < picture.shape[0])
    assert inside.all(), "some of the image is off the screen"
    return picture[y, x].astype(int), control[y, x].astype(int)


def faults_of_pixels(after, before, labels, segments):
    """What is wrong with the pixels: each voxel must be tinted by its segment, or by none."""
    tint = after - before
    tinted = np.abs(tint).max(axis=-1) > _COLOURED // 2
    faults = []
    if (wrong := int((tinted != (labels > 0)).sum())) > 0:
        faults.append(f"{wrong} voxels are tinted and should not be, or the reverse")
    for segment in segments:
        mask = labels == segment.value
        if mask.any():
            towards = np.array(segment.colour) - before[mask].mean(axis=0)
            likeness = float(tint[mask].mean(axis=0) @ towards) / (
                np.linalg.norm(tint[mask].mean(axis=0)) * np.linalg.norm(towards) + 1e-9
            )
            if likeness < 0.97:
                faults.append(
                    f"{segment.label} is tinted {tint[mask].mean(axis=0).round()}, not towards {segment.colour}"
                )
    return faults


@pytest.mark.parametrize("form", ["", "LABELMAP"])
def test_masks_are_drawn_in_their_colours_where_they_are(shown, case, look, form):
    seg = of(case, "seg", form)[0]
    frame = case.findings.findings[0].box.frame
    uid = case.volume.source.dataset_of(frame).SOPInstanceUID
    labels, segments = case.findings.labels[0], case.findings.segments_of(0)
    with look(shown.url) as viewer:
        viewer.open(seg.StudyInstanceUID, case.volume.source.datasets[0].SeriesInstanceUID, seg.SeriesInstanceUID)
        viewer.go_to(uid)
        control = viewer.picture("control")
        viewer.open_result("SEG")
        viewer.go_to(uid)
        picture = viewer.picture("overlay")

        held = viewer.segmentations()
        assert not faults_of_state(held, truth(case))
        after, before = sampled(viewer, case, frame, control, picture)
        assert not faults_of_pixels(after, before, labels[frame], segments)
        assert not viewer.problems
        assert not viewer.requests_elsewhere

    # the same picture against a truth that is moved by one voxel, mirrored, or has its colours changed round
    assert faults_of_pixels(after, before, np.roll(labels[frame], 1, axis=1), segments)
    assert faults_of_pixels(after, before, np.roll(labels[frame], 1, axis=0), segments)
    assert faults_of_pixels(after, before, labels[frame][:, ::-1], segments)
    swapped = [replace(one, colour=two.colour) for one, two in zip(segments, segments[::-1], strict=True)]
    assert faults_of_pixels(after, before, labels[frame], swapped)
    assert faults_of_state(held, {label: (voxels + 1, colour) for label, (voxels, colour) in truth(case).items()})


def test_a_label_map_with_its_background_first_would_be_noticed(shown, case, look, tmp_path):
    """The order that highdicom writes: OHIF takes the first item's colour for the first segment."""
    wrong = of(case, "seg", "LABELMAP")[0]
    wrong = type(wrong).from_dataset(wrong) if hasattr(type(wrong), "from_dataset") else wrong
    items = list(wrong.SegmentSequence)
    wrong.SegmentSequence = [items[-1], *items[:-1]]
    wrong.SOPInstanceUID, wrong.SeriesInstanceUID = hd.UID(), hd.UID()
    wrong.file_meta.MediaStorageSOPInstanceUID = wrong.SOPInstanceUID
    path = tmp_path / "wrong.dcm"
    wrong.save_as(path, enforce_file_format=True)
    peer = Peer(ae_title="ORTHANC", host="127.0.0.1", port=shown.dicom_port)
    deliver([Parcel.of_file(path)], peer, ae_title="SCANNER", timing=DeliveryTable())
    with look(shown.url) as viewer:
        viewer.open(wrong.StudyInstanceUID, case.volume.source.datasets[0].SeriesInstanceUID, wrong.SeriesInstanceUID)
        viewer.open_result("SEG")
        viewer.picture("background-first")

        assert faults_of_state(viewer.segmentations(), truth(case))


def corners_of(box, case):
    points = [(box.left, box.top), (box.right, box.top), (box.right, box.bottom), (box.left, box.bottom)]
    return in_patient(np.array(points), case.volume.source.header_of(box.frame))


def is_box(points, corners, tolerance=0.02):
    """Whether every corner is one of the points and the reverse, to a fiftieth of a millimetre."""
    distances = np.linalg.norm(np.asarray(points)[:, None] - corners[None], axis=-1)
    return distances.min(axis=0).max() <= tolerance and distances.min(axis=1).max() <= tolerance


def test_boxes_are_drawn_where_the_findings_are_and_can_be_edited(shown, case, look):
    report = of(case, "sr", "")[0]
    finding = case.findings.findings[0]
    uid = case.volume.source.dataset_of(finding.box.frame).SOPInstanceUID
    tracked = {finding.tracking_uid for finding in case.findings.findings}
    tracked |= {segment.tracking_uid for segment in case.findings.segments}
    with look(shown.url) as viewer:
        series = case.volume.source.datasets[0].SeriesInstanceUID
        viewer.open(report.StudyInstanceUID, series, report.SeriesInstanceUID)
        viewer.go_to(uid)
        control = viewer.picture("control")
        viewer.open_result("SR")
        viewer.press("Yes")
        viewer.go_to(uid)
        picture = viewer.picture("hydrated")

        hydrated = viewer.measurements()
        assert len(hydrated) == len(tracked)
        ours = [one for one in hydrated if one["sop"] == uid and is_box(one["points"], corners_of(finding.box, case))]
        assert len(ours) == 1
        moved = replace(finding.box, left=finding.box.left + 1, right=finding.box.right + 1)
        assert not is_box(ours[0]["points"], corners_of(moved, case))

        places = [viewer.place_on_canvas(point.tolist()) for point in corners_of(finding.box, case)]
        drawn = [
            is_drawn(control, picture, one, two) for one, two in zip(places, [*places[1:], places[0]], strict=True)
        ]
        assert min(drawn) > 0.5
        assert "mm" in ours[0]["text"]

        listed = viewer.measurement_panel("panel")
        assert {number: title for number, (title, _) in listed.items()} == expected_rows(case)
        assert len(listed) == len(tracked)
        key_image = int(case.volume.source.dataset_of(finding.box.frame).InstanceNumber)
        assert "mm²" in listed[key_image][1], "statistics come once an image has been looked at"
        assert viewer.warnings["Unable to generate tool state"] <= len(tracked), "one for each group of a segment"
        assert not viewer.problems
        assert not viewer.requests_elsewhere


def expected_rows(case):
    """The measurement panel's rows: the number of the image, and what is there."""
    rows = {}
    for tracked in (*case.findings.segments, *case.findings.findings):
        box = tracked.box if isinstance(tracked, Finding) else Layers(case.findings).box_of(tracked)
        rows[int(case.volume.source.dataset_of(box.frame).InstanceNumber)] = (
            tracked.finding if isinstance(tracked, Finding) else tracked.type
        ).meaning
    return rows


def is_drawn(control, picture, start, end):
    """The part of a line from corner to corner along which the picture has changed."""
    hits = 0
    for part in np.linspace(0.2, 0.8, 25):
        x, y = (round(one + part * (two - one)) for one, two in zip(start, end, strict=True))
        before, after = (shot[y - 2 : y + 3, x - 2 : x + 3].astype(int) for shot in (control, picture))
        hits += bool((np.abs(after - before).max(axis=-1) > _COLOURED).any())
    return hits / 25


def number_of_findings(folder):
    """How many boxes the report of the nodule model has, as highdicom reads it."""
    kept = [path for path in (folder / "node" / "results").rglob("*.dcm")]
    reports = [
        path for path in kept if "nodules" in (header := dcmread(path)).SeriesDescription and header.Modality == "SR"
    ]
    counts = {len(hd.sr.srread(path).content.get_planar_roi_measurement_groups()) for path in reports}
    assert len(counts) == 1
    return counts.pop()


def asked(port, target, **headers):
    """The status, the headers and the beginning of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read(1000)
    finally:
        connection.close()


def test_pages_and_images_are_for_whoever_has_the_token(stand):
    token = stand.url.rpartition("=")[2]
    for target in ("/", "/viewer?StudyInstanceUIDs=1.2", "/dicom-web/studies", f"/?token={token[:-1]}"):
        assert asked(stand.port, target)[0] == 401
    assert asked(stand.orthanc_port, "/studies")[0] == 401

    status, headers, _ = asked(stand.port, f"//viewer?StudyInstanceUIDs=1.2&token={token}")

    assert (status, headers["Location"]) == (303, "/viewer?StudyInstanceUIDs=1.2")
    assert "HttpOnly" in headers["Set-Cookie"]
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert asked(stand.port, "/dicom-web/studies", Cookie=cookie)[0] == 200
    assert asked(stand.port, "/", Cookie=cookie)[0] == 200
    assert asked(stand.port, "/", Cookie="dicom-node-viewer=guessed")[0] == 401


@pytest.mark.peer("storescu")
def test_a_study_pushed_to_the_pacs_comes_back_with_results_that_can_be_looked_at(tmp_path, look):
    """As the user does it: one command, a study pushed by DCMTK, and a look."""
    paths = write_series(make_thorax(seed=3), tmp_path / "study")
    stand = Stand(tmp_path / "viewer")
    try:
        assert storescu(stand.dicom_port, *paths, called="ORTHANC").returncode == 0
        wait_for("results of both models", lambda: stand.log().count("stored at ORTHANC") == 2, seconds=120)
        study = dcmread(paths[0], stop_before_pixels=True).StudyInstanceUID
        with look(stand.url) as viewer:
            viewer.open(study)
            viewer.open_result("Lungs")
            viewer.picture("lungs")

            assert {segment["label"] for segment in viewer.segmentations()} == {"Right lung", "Left lung"}
            assert all(segment["voxels"] for segment in viewer.segmentations())

            viewer.open_result(re.compile(r"SR\s*AI Lung nodules"))
            viewer.press("Yes")
            viewer.open_result(re.compile(r"SEG\s*AI Lung nodules"))
            viewer.measurement_panel("nodules")

            assert len(viewer.measurements()) == number_of_findings(tmp_path / "viewer") >= 3
            assert not viewer.problems
    finally:
        assert stand.end() == 0
