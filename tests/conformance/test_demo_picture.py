"""What the demonstration reads back and draws, where a SEG has one frame only and says everything in common."""

from __future__ import annotations

import numpy as np
from PIL import Image
from pydicom import dcmread

from dicom_node.demo.picture import draw
from dicom_node.demo.reading import frame_segments, read_report
from dicom_node.results import encode_all
from tests.conformance.cases import context, manifest
from workers.findings_of import findings_of
from workers.prediction import Detection, Prediction


def test_a_finding_on_a_single_slice_is_read_and_drawn(case_of, tmp_path):
    case = case_of("axial")
    instances = np.zeros(case.volume.grid.values.shape, np.uint16)
    instances[4, 10:15, 20:27] = 1
    found = Detection("nodule", ((4, 5), (10, 15), (20, 27)), (4.0, 12.0, 23.0), 0.9, 1, "right", {"diameter": 9.0})
    prediction = Prediction(instances=instances, detections=(found,))
    findings = findings_of(prediction, case.volume, manifest(organs=False), context())
    paths = {}
    for result in encode_all(("seg", "sr"), findings, case.volume.source, context()):
        paths[result.kind] = tmp_path / f"{result.kind}.dcm"
        result.dataset.save_as(paths[result.kind], enforce_file_format=True)

    report = read_report(paths["sr"], [paths["seg"]])
    draw([report], [paths["seg"]], case.paths, tmp_path / "picture.png")

    assert frame_segments(dcmread(paths["seg"])).tolist() == [1]
    assert [group.label for group in report.findings] == ["Nodule 1"]
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 500
