"""Voxels become codes, boxes and numbers; a model that makes no sense is refused before anything is written."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydicom.sr._concepts_dict import concepts

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.errors import ModelRefused, NotApplicable
from dicom_node.findings import Reason
from tests.conformance.cases import GEOMETRIES, SMALL, context, manifest, predict
from tests.datasets import series_of, write
from workers.findings_of import box_on_source, findings_of
from workers.prediction import Detection, Prediction
from workers.quantities import _DETECTED, volumes_by_value
from workers.structures import LATERALITY
from workers.volume import load


def volume_of(tmp_path, geometry="axial"):
    return load(write_series(make_thorax(**{**SMALL, **GEOMETRIES[geometry]}, seed=7), tmp_path / geometry))


@pytest.fixture
def volume(tmp_path):
    return volume_of(tmp_path)


@pytest.fixture
def prediction(volume):
    return predict(volume)


def detection(**changes):
    made = Detection("nodule", ((2, 5), (3, 7), (2, 6)), (3.0, 5.0, 4.0), 0.5, None, "right", {"volume": 1000.0})
    return replace(made, **changes)


def test_segments_carry_the_manifest_s_codes_side_and_colour(prediction, volume):
    right, left, nodule = findings_of(prediction, volume, manifest(), context()).segments

    assert (right.label, right.laterality.meaning, right.colour) == ("Right lung", "Right", (224, 97, 76))
    assert (left.label, left.laterality.meaning) == ("Left lung", "Left")
    assert (nodule.label, nodule.layer, nodule.value) == ("Nodule 1", 1, 1)


def test_a_segment_without_a_voxel_is_left_out(prediction, volume):
    prediction.labels[prediction.labels == 1] = 0

    assert [segment.label for segment in findings_of(prediction, volume, manifest(), context()).segments] == [
        "Left lung",
        "Nodule 1",
    ]


def test_a_volume_is_counted_with_what_each_slice_stands_for(tmp_path):
    paths = []
    for number, (dataset, z) in enumerate(zip(series_of(4), (0.0, 5.0, 15.0, 20.0), strict=True)):
        dataset.ImagePositionPatient = [0, 0, z]
        paths.append(write(dataset, tmp_path / f"{number}.dcm"))
    grid = load(paths).grid
    labels = np.zeros(grid.values.shape, np.uint8)
    labels[1, 2:4, 5:8] = 3  # 6 pixels of 0.75 x 0.75 mm on a slice that stands for 2.5 + 5 mm

    assert volumes_by_value(labels, grid) == {3: pytest.approx(6 * 0.75**2 * 7.5)}


def test_findings_are_ranked_and_named_by_confidence(volume):
    prediction = Prediction(detections=(detection(confidence=0.2), detection(confidence=0.9)))

    found = findings_of(prediction, volume, manifest(), context()).findings

    assert [(finding.label, finding.confidence) for finding in found] == [("Nodule 1", 0.9), ("Nodule 2", 0.2)]
    assert len({finding.tracking_uid for finding in found}) == 2


def test_an_outline_nobody_claims_gets_no_segment_and_the_others_no_gap(prediction, volume):
    prediction.instances[8:10, 8:10, 8:10] = 4
    prediction.instances[10:12, 10:12, 10:12] = 300
    other = detection(box=((10, 12), (10, 12), (10, 12)), centre=(11, 11, 11), value=300)
    twice = replace(prediction, detections=(other, *prediction.detections))

    findings = findings_of(twice, volume, manifest(), context())

    assert np.unique(findings.labels[1]).tolist() == [0, 1, 2]
    assert findings.labels[1].dtype == np.uint8
    assert [findings.segments[finding.segment].value for finding in findings.findings] == [1, 2]


def test_nothing_found_is_a_negative_answer_about_what_was_looked_for(volume):
    findings = findings_of(Prediction(), volume, manifest(organs=False), context())

    assert findings.is_negative
    assert [code.meaning for code in findings.looked_for] == ["Nodule"]
    assert findings.labels == ()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("outline", [True, False])
def test_the_box_is_where_the_voxels_of_its_key_plane_are(tmp_path, geometry, outline):
    """Compared with the long way: paint the voxels, carry the whole mask over, look where they are."""
    volume = volume_of(tmp_path, geometry)
    prediction = predict(volume, outline=outline)
    (found,) = prediction.detections
    painted = np.zeros(volume.grid.values.shape, bool)
    if outline:
        painted |= prediction.instances == found.value
    else:
        plane = [slice(*bounds) for bounds in found.box]
        plane[volume.grid.stack] = round(found.centre[volume.grid.stack])
        painted[tuple(plane)] = True
    on_source = volume.to_source(painted)
    largest = on_source.sum(axis=(1, 2)).max()

    box = box_on_source(found, volume, prediction.instances)

    rows, columns = np.nonzero(on_source[box.frame])
    assert on_source[box.frame].sum() == largest
    assert (box.left, box.right) == (columns.min(), columns.max() + 1)
    assert (box.top, box.bottom) == (rows.min(), rows.max() + 1)


def test_a_centre_outside_the_grid_still_has_a_key_plane(volume):
    assert box_on_source(detection(centre=(99.0, 5, 4)), volume, None).frame == len(volume.source.frames) - 1


def test_the_same_prediction_has_the_same_tracking_uids_and_another_model_others(prediction, volume):
    first, again, other = (
        {segment.tracking_uid for segment in findings_of(prediction, volume, manifest(), made).segments}
        for made in (context(), context(), context(input_digest="00" * 32))
    )

    assert first == again
    assert not first & other


def test_a_model_of_structures_that_sees_none_does_not_apply(volume):
    nothing = Prediction(labels=np.zeros(volume.grid.values.shape, np.uint8))

    with pytest.raises(NotApplicable) as refused:
        findings_of(nothing, volume, manifest(nodules=False), context())

    assert refused.value.reason == Reason.ORGAN_NOT_FOUND


FAULTS = {
    "an unknown detection": {"name": "fracture"},
    "a side that is none": {"laterality": "middle"},
    "no confidence": {"confidence": float("nan")},
    "an endless volume": {"measurements": {"volume": float("inf")}},
    "a centre that is none": {"centre": (float("nan"), 1.0, 1.0)},
    "an empty box": {"box": ((2, 2), (3, 7), (2, 6))},
    "a box outside": {"box": ((2, 5), (3, 7), (2, 6000))},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_detection_that_makes_no_sense_is_refused(volume, fault):
    with pytest.raises(ModelRefused):
        findings_of(Prediction(detections=(detection(**FAULTS[fault]),)), volume, manifest(), context())


def test_two_detections_with_one_outline_are_refused(prediction, volume):
    with pytest.raises(ModelRefused, match="one outline"):
        findings_of(replace(prediction, detections=prediction.detections * 2), volume, manifest(), context())


def test_a_label_that_the_manifest_does_not_name_is_refused(prediction, volume):
    prediction.labels[0, 0, 0] = 7

    with pytest.raises(ModelRefused, match="7"):
        findings_of(prediction, volume, manifest(), context())


@pytest.mark.parametrize("field", ["labels", "instances"])
def test_a_mask_of_another_shape_is_refused(prediction, volume, field):
    cut = replace(prediction, **{field: getattr(prediction, field)[:-1]})

    with pytest.raises(ModelRefused, match="shape"):
        findings_of(cut, volume, manifest(), context())


def test_the_codes_of_measurements_and_sides_exist():
    used = [code for name, unit, _ in _DETECTED.values() for code in (name, unit)]
    used += [code for code in LATERALITY.values() if code]

    for code in used:
        assert code.value in {value for values in concepts[code.scheme].values() for value in values}, code
