"""Models on single frames: radiographs, mammograms, ultrasound still and moving; from files to sound results."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from pydicom import dcmread

from dicom_node.errors import NotApplicable
from dicom_node.results import ORDER, encode_all
from dicom_node.selfcheck import require_sound
from tests.conformance.cases import context
from tests.conformance.test_kinds import image
from tests.integration.test_networks import folder_of, torchscript
from workers.bundle import Bundles
from workers.findings_of import findings_of
from workers.fitness import check_input
from workers.volume import load

SPOT = (slice(12, 19), slice(30, 42))  # rows, columns: up on the right of the picture
FLAT = """
[inputs.image]
modality = ["{modality}"]
dimensions = 2
{preparation}
[outputs.boxes]
boxes = 0
scores = 1
labels = 2
[outputs.detections.mass]
label = "Mass"
category = {{ value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }}
finding = {{ value = "4147007", scheme = "SCT", meaning = "Mass" }}
colour = [250, 200, 40]
value = 1
"""
DRAWN = """
[inputs.image]
modality = ["DX"]
dimensions = 2
[outputs.segments.1]
label = "Mass"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "4147007", scheme = "SCT", meaning = "Mass" }
colour = [250, 200, 40]
measurements = ["volume", "diameter"]
"""


class Spot(torch.nn.Module):
    """The box of all that is brighter than a threshold in the first channel."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = torch.nonzero(picture[0, 0] > self.threshold).to(torch.float32)
        if places.shape[0] == 0:
            return torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)
        box = torch.cat([places.min(dim=0)[0], places.max(dim=0)[0] + 1.0])
        return box[None], torch.tensor([0.8]), torch.tensor([1])


class Drawn(torch.nn.Module):
    """Two channels: nothing, and what is brighter than a threshold."""

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(picture), picture - 2500.0], dim=1)


@pytest.fixture
def bundles():
    made = Bundles(device="cpu")
    yield made
    made.close()


def radiograph(folder, photometric="MONOCHROME2"):
    pixels = (np.arange(60)[:, None] * 5 + np.arange(64)[None] * 9 + 100).astype(np.uint16)
    pixels[SPOT] = 3000
    if photometric == "MONOCHROME1":
        pixels = (3100 - pixels.astype(int)).astype(np.uint16)
    made = image(
        *("1.2.840.10008.5.1.4.1.1.1.1", pixels),
        Modality="DX",
        PhotometricInterpretation=photometric,
        BitsStored=12,
        HighBit=11,
        PatientOrientation=["L", "F"],
        ImagerPixelSpacing=[0.2, 0.15],
        BodyPartExamined="CHEST",
        WindowCenter=600,
        WindowWidth=900,
        RescaleIntercept=0,
        RescaleSlope=1,
        RescaleType="US",
        PresentationLUTShape="IDENTITY" if photometric == "MONOCHROME2" else "INVERSE",
    )
    made.save_as(folder / "dx.dcm", enforce_file_format=True)
    return [folder / "dx.dcm"]


def loop(folder):
    """A loop in colour whose spot is on the third frame alone."""
    pixels = np.random.default_rng(2).integers(0, 120, (5, 60, 64, 3), np.uint8)
    pixels[2][SPOT] = 250
    made = image(
        *("1.2.840.10008.5.1.4.1.1.3.1", pixels),
        Modality="US",
        PhotometricInterpretation="RGB",
        NumberOfFrames=5,
        BodyPartExamined="HEART",
    )
    made.save_as(folder / "us.dcm", enforce_file_format=True)
    return [folder / "us.dcm"]


def run(bundles, folder, paths):
    bundle = bundles.get(folder)
    volume = load(paths, bundle.manifest.input)
    check_input(volume, bundle.manifest.input)
    prediction = bundle.model(volume.grid, lambda part: None)
    return volume, findings_of(prediction, volume, bundle.manifest, context())


def encoded(kinds, findings, volume):
    results = encode_all(kinds, findings, volume.source, context())
    contents = []
    for result in results:
        buffer = BytesIO()
        result.dataset.save_as(buffer, enforce_file_format=True)
        contents.append(buffer.getvalue())
    require_sound(contents, volume.source)
    return {result.kind: result.dataset for result in results}


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("preparation", ["", "shape = [1, 120, 96]\nfit = 'resize'", "spacing = [1.0, 0.1, 0.1]"])
def test_a_detector_on_a_radiograph_draws_its_box_where_the_mass_is(tmp_path, bundles, photometric, preparation):
    content = torchscript(Spot(2000.0), tmp_path / "n.pt")
    folder = folder_of(tmp_path, "torchscript", "w.pt", content, FLAT.format(modality="DX", preparation=preparation))

    volume, findings = run(bundles, folder, radiograph(tmp_path, photometric))

    [finding] = findings.findings
    allowed = 1.0 if preparation else 0.0
    assert abs(finding.box.top - SPOT[0].start) <= allowed
    assert abs(finding.box.bottom - SPOT[0].stop) <= allowed
    assert abs(finding.box.left - SPOT[1].start) <= allowed
    assert abs(finding.box.right - SPOT[1].stop) <= allowed
    made = encoded(ORDER, findings, volume)
    assert {"sr", "gsps", "sc", "kos"} <= set(made)


def test_a_mask_on_a_radiograph_comes_back_pixel_for_pixel_and_has_no_volume(tmp_path, bundles):
    folder = folder_of(tmp_path, "torchscript", "w.pt", torchscript(Drawn(), tmp_path / "n.pt"), DRAWN)

    volume, findings = run(bundles, folder, radiograph(tmp_path))

    truth = np.zeros((1, 60, 64), bool)
    truth[0][SPOT] = True
    assert np.array_equal(findings.labels[0] == 1, truth)
    [measurement] = findings.segments[0].measurements
    assert measurement.name.meaning == "Long axis"
    assert measurement.value == pytest.approx(np.hypot(7 * 0.2, 12 * 0.15), rel=1e-3)
    segmentation = encoded(("seg", "sr", "gsps", "sc"), findings, volume)["seg"]
    assert np.array_equal(segmentation.pixel_array.reshape(truth.shape) > 0, truth)


def test_a_detector_on_a_loop_names_the_frame(tmp_path, bundles):
    content = torchscript(Spot(200.0), tmp_path / "n.pt")
    folder = folder_of(tmp_path, "torchscript", "w.pt", content, FLAT.format(modality="US", preparation=""))

    volume, findings = run(bundles, folder, loop(tmp_path))

    [finding] = findings.findings
    assert finding.box.frame == 2
    assert (finding.box.left, finding.box.top) == (SPOT[1].start, SPOT[0].start)
    report = encoded(("seg", "sr", "gsps", "sc"), findings, volume)["sr"]
    frames = {line.split("IS:")[1].strip() for line in str(report).splitlines() if "Referenced Frame Number" in line}
    assert frames == {"'3'"}


def test_a_model_for_volumes_does_not_apply_to_a_radiograph(tmp_path):
    with pytest.raises(NotApplicable, match="geometry_unusable"):
        load(radiograph(tmp_path))


def test_views_of_another_size_are_left_out_and_noted(tmp_path):
    from dicom_node.manifest import InputSlot

    [first] = radiograph(tmp_path)
    small = dcmread(first)
    small.SOPInstanceUID = small.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    small.Rows, small.PixelData = 30, small.PixelData[: 30 * 64 * 2]
    small.save_as(tmp_path / "small.dcm", enforce_file_format=True)
    same = dcmread(first)
    same.SOPInstanceUID = same.file_meta.MediaStorageSOPInstanceUID = "1.2.3.5"
    same.InstanceNumber = 2
    same.save_as(tmp_path / "same.dcm", enforce_file_format=True)

    volume = load([tmp_path / "same.dcm", tmp_path / "small.dcm", first], InputSlot(modality=("DX",), dimensions=2))

    assert volume.grid.shape == (2, 60, 64)
    assert [int(header.InstanceNumber) for header in volume.source.datasets] == [1, 2]
    assert volume.notes == ("1 images of another size left out",)
    assert not volume.grid.placed


def test_a_real_loop_and_a_real_still_are_frames(shared_data):
    from dicom_node.manifest import InputSlot

    slot = InputSlot(modality=("US",), dimensions=2)

    loop = load([shared_data / "us_cine" / "GREYSCALE_CINE.dcm"], slot)
    still = load([shared_data / "us_cine" / "RGB_IMAGE.dcm"], slot)

    assert loop.grid.shape == (27, 600, 800)
    assert loop.grid.values.ndim == 3
    assert still.grid.values.ndim == 4
    assert still.grid.values.shape[3] == 3
