"""Layers, pieces, measurements and guards, on masks of known size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydicom.sr._concepts_dict import concepts

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import parse
from tests.conformance.cases import SMALL, context
from workers import quantities
from workers.findings_of import findings_of
from workers.guarding import guarded
from workers.prediction import Prediction
from workers.quantities import extent_of
from workers.volume import load

MANIFEST = """
schema = 1
name = "lesions"
version = "1.0.0"
title = "Lesions"
manufacturer = "m"
licence = "MIT"
intended_use = "tests"
runtime = "algorithm"
[inputs.ct]
modality = ["CT"]
[outputs.segments.1]
label = "Mass"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "4147007", scheme = "SCT", meaning = "Mass" }
colour = [250, 200, 40]
measurements = ["volume", "diameter", "short_axis", "mean"]
instances = true
[outputs.segments.2]
label = "Left lung"
category = { value = "91723000", scheme = "SCT", meaning = "Anatomical Structure" }
type = { value = "39607008", scheme = "SCT", meaning = "Lung" }
laterality = "left"
colour = [84, 150, 224]
"""
GUARDED = MANIFEST + "[guards.2]\n"


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return load(write_series(make_thorax(**SMALL, seed=7), tmp_path_factory.mktemp("ct")))


@pytest.fixture
def labels(volume):
    made = np.zeros(volume.grid.shape, np.uint8)
    made[2:5, 4:8, 10:20] = 1  # the larger mass
    made[9:11, 30:33, 40:42] = 1
    made[3:9, 10:20, 30:40] = 2
    return made


def findings(prediction, volume, text=MANIFEST):
    return findings_of(prediction, volume, parse(text), context())


def measured(segment):
    return {one.name.meaning: one.value for one in segment.measurements}


def test_each_piece_is_a_segment_with_an_identity_of_its_own(labels, volume):
    found = findings(Prediction(labels=labels), volume)

    assert [segment.label for segment in found.segments] == ["Mass 1", "Mass 2", "Left lung"]
    assert len({segment.tracking_uid for segment in found.segments}) == 3
    for segment, truth in zip(found.segments, (labels == 1, labels == 1, labels == 2), strict=True):
        mask = found.labels[0] == segment.value
        assert (volume.to_source(truth.astype(np.uint8))[mask] == 1).all()
    assert (found.labels[0] > 0).sum() == (labels > 0).sum()
    sizes = [(found.labels[0] == segment.value).sum() for segment in found.segments[:2]]
    assert sizes == [120, 12]


def test_a_piece_is_measured_by_itself(labels, volume):
    k, j, i = volume.grid.spacing
    larger, smaller, _ = findings(Prediction(labels=labels), volume).segments

    assert measured(larger)["Volume"] == pytest.approx(120 * k * j * i / 1000, rel=1e-3)
    assert measured(larger)["Long axis"] == pytest.approx(np.hypot(4 * j, 10 * i), rel=1e-3)
    assert measured(smaller)["Long axis"] == pytest.approx(np.hypot(3 * j, 2 * i), rel=1e-3)
    mean = volume.grid.values[2:5, 4:8, 10:20].mean()
    if volume.grid.modality == "CT":
        assert measured(larger)["Attenuation Coefficient"] == pytest.approx(mean, rel=1e-3)


def test_the_short_axis_is_at_a_right_angle_to_the_long_one(volume):
    grid = volume.grid
    mask = np.zeros(grid.shape, bool)
    mask[4, 5, 10:30] = True  # a line, one pixel high
    extent = extent_of(mask, grid)

    assert extent.long_axis == pytest.approx(np.hypot(20 * grid.spacing[2], grid.spacing[1]))
    assert extent.short_axis < 3 * grid.spacing[1]
    assert extent.short_axis > 0.9 * grid.spacing[1]


def test_labels_that_overlap_are_in_layers_of_their_own(labels, volume):
    second = np.zeros_like(labels)
    second[4:8, 12:30, 20:35] = 2
    found = findings(Prediction(labels=np.where(labels == 1, labels, 0), overlapping=(second,)), volume)

    assert [(segment.label, segment.layer) for segment in found.segments] == [
        ("Mass 1", 0),
        ("Mass 2", 0),
        ("Left lung", 1),
    ]
    assert (found.labels[1] == 2).sum() == (second == 2).sum()


@pytest.mark.parametrize("constants", [quantities._SIGNAL.values(), [(quantities._LONG_AXIS, quantities._SHORT_AXIS)]])
def test_every_code_of_a_measurement_exists(constants):
    for codes in constants:
        for code in codes:
            if code.scheme != "UCUM":
                meanings = {
                    meaning
                    for values in concepts[code.scheme].values()
                    for value, (meaning, _) in values.items()
                    if value == code.value
                }
                assert code.meaning in meanings


# -- guards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        ("volume = { min = 5000 }", Reason.VOLUME_OUT_OF_RANGE),
        ("volume = { max = 1 }", Reason.VOLUME_OUT_OF_RANGE),
        ("confidence = 0.9", Reason.UNSURE),
        ("surroundings = 1000.0", Reason.NOTHING_AROUND),
    ],
)
def test_what_cannot_be_right_does_not_apply(labels, volume, guard, reason):
    prediction = Prediction(labels=labels, certainty={1: 0.99, 2: 0.8})

    with pytest.raises(NotApplicable) as caught:
        guarded(prediction, volume.grid, parse(GUARDED + guard))

    assert caught.value.reason == reason
    assert "Left lung" in caught.value.detail


def test_a_structure_in_pieces_does_not_apply(labels, volume):
    labels[12, 2:6, 2:6] = 2
    for guard in ("components = 1", "largest_component = 0.99"):
        with pytest.raises(NotApplicable, match="in_pieces"):
            guarded(Prediction(labels=labels), volume.grid, parse(GUARDED + guard))
    assert guarded(Prediction(labels=labels), volume.grid, parse(GUARDED + "components = 2")).labels is labels


def test_a_structure_that_is_cut_off_is_partial_or_refused(labels, volume):
    labels[0] = np.where(labels[3] == 2, 2, 0)
    labels[1:3] = labels[0]
    prediction = Prediction(labels=labels)

    partial = guarded(prediction, volume.grid, parse(GUARDED + 'border = "partial"'))

    assert partial.incomplete == ("Left lung is cut off: below",)
    assert guarded(prediction, volume.grid, parse(GUARDED + 'border = "allow"')).incomplete == ()
    with pytest.raises(NotApplicable, match="cut_off"):
        guarded(prediction, volume.grid, parse(GUARDED + 'border = "refuse"'))


def test_what_is_as_it_should_be_passes(labels, volume):
    text = GUARDED + 'volume = { min = 1, max = 9000 }\ncomponents = 1\nconfidence = 0.5\nborder = "refuse"'
    prediction = Prediction(labels=labels, certainty={2: 0.8})

    assert guarded(prediction, volume.grid, parse(text)) is prediction
    nothing = replace(prediction, labels=np.zeros_like(labels))
    assert guarded(nothing, volume.grid, parse(text)) is nothing
