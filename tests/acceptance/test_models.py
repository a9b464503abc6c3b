"""Models of a hospital's own, as files in folders, on studies that are pushed to the node."""

from __future__ import annotations

import json
from io import BytesIO

import pytest
import torch
from pydicom import dcmread
from pydicom.uid import generate_uid

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.manifest import RUNS_CODE
from tests.acceptance.stand import storescu, wait_for
from tests.integration import formats
from tests.integration.formats import SEGMENT, model_folder
from tests.integration.test_flat import FLAT, Spot, radiograph
from tests.integration.test_networks import Threshold, folder_of, torchscript
from tests.integration.test_networks import exported as onnx

pytestmark = [pytest.mark.peer("storescu"), pytest.mark.peer("Orthanc")]

PAIR = """
[inputs.early]
modality = ["CT"]
when = { SeriesDescription = "early" }
[inputs.late]
modality = ["CT"]
when = { SeriesDescription = "late" }
[outputs.segments.1]
label = "Washout"
category = { value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }
type = { value = "4147007", scheme = "SCT", meaning = "Mass" }
colour = [250, 200, 40]
"""
SINGLE = PAIR.replace('[inputs.late]\nmodality = ["CT"]\nwhen = { SeriesDescription = "late" }\n', "").replace(
    'when = { SeriesDescription = "early" }', 'prefer = ["thinnest"]'
)


class Difference(torch.nn.Module):
    """Two channels: nothing, and where the first input is far brighter than the last."""

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        change = pair[:, :1] - pair[:, -1:] * float(pair.shape[1] - 1)
        return torch.cat([torch.zeros_like(change), change - 500.0], dim=1)


def series(folder, description, *, brighter=False, **changes):
    """A series of the one study; where `brighter`, with a block of metal low in front on the right."""
    paths = write_series(make_thorax(slices=16, size=(60, 78), spacing=(15.0, 5.4, 4.6), noise=0.0, seed=1), folder)
    series_uid = generate_uid()
    for number, path in enumerate(paths):
        dataset = dcmread(path)
        dataset.SeriesInstanceUID, dataset.SOPInstanceUID = series_uid, generate_uid()
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.SeriesDescription = description
        for keyword, value in changes.items():
            setattr(dataset, keyword, value)
        if brighter and 4 <= number < 7:
            pixels = dataset.pixel_array.copy()
            pixels[20:26, 12:24] += 1500
            dataset.PixelData = pixels.tobytes()
        dataset.save_as(path, enforce_file_format=True)
    return paths


def softmax(axes):
    """A manifest's rest for networks that answer logits of values as they are: 500 and brighter is bone."""
    return SEGMENT.format(axes=axes).replace('activation = "labels"', 'activation = "softmax"')


def inferences(running):
    return [job for job in running.jobs() if job["kind"] == "infer"]


def test_a_model_of_two_series_waits_for_the_second_one(node, orthanc, tmp_path):
    models = tmp_path / "models"
    folder_of(models, "torchscript", "w.pt", torchscript(Difference(), tmp_path / "n.pt"), PAIR, "pair")
    running = node(pacs_port=orthanc.dicom_port, models=["pair"], node=f'models = "{models}"').start()

    storescu(running.port, *series(tmp_path / "early", "early", brighter=True))
    [job] = [job for job in running.wait_until_idle(jobs=1) if job["kind"] == "infer"]
    assert (job["state"], job["reason"]) == ("not_applicable", "missing_input")
    assert "inputs.late" in job["detail"]

    storescu(running.port, *series(tmp_path / "late", "late"))
    wait_for("the SEG", lambda: orthanc.files_of("SEG"), seconds=60)
    states = {job["state"]: job["reason"] for job in running.wait_until_idle(jobs=3) if job["kind"] == "infer"}

    assert states == {"done": None, "not_applicable": "wrong_header"}
    [segmentation] = [dcmread(BytesIO(content)) for content in orthanc.files_of("SEG")]
    masks = segmentation.pixel_array
    assert masks.shape[0] == 3
    assert masks[:, 20:26, 12:24].all()
    assert masks.sum() == 3 * 6 * 12


def test_every_format_runs_on_a_routed_study(node, orthanc, tmp_path):
    """One folder of each kind, as models/README.md says, and no line of the node's code touched."""
    nets = pytest.importorskip("monai.networks.nets")
    pytest.importorskip("nnunetv2")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(11)
    models, example = tmp_path / "models", torch.zeros(1, 1, 8, 10, 12)
    network = nets.UNet(**formats.UNET).eval()
    written = ", ".join(
        f"{key} = {list(value) if isinstance(value, tuple) else value}" for key, value in formats.UNET.items()
    )
    architecture = f'architecture = {{ name = "monai.UNet", arguments = {{ {written} }} }}\n'
    shaped = softmax("SPL").replace("[inputs.ct]", "[inputs.ct]\nshape = [16, 64, 80]", 1)
    made = {
        "by_torchscript": (
            "torchscript",
            {"w.pt": torchscript(Threshold(), tmp_path / "n.pt")},
            softmax("SPL"),
        ),
        "by_onnx": ("onnx", {"w.onnx": onnx(Threshold(), tmp_path / "n.onnx", example)}, softmax("LIA")),
        "by_pt2": ("pt2", {"w.pt2": formats.exported(Threshold(), example)}, softmax("RAS")),
        "by_state_dict": ("state_dict", {"w.pth": formats.saved(network.state_dict())}, architecture + shaped),
        "by_bundle": ("monai_bundle", formats.monai_segmentation(network.state_dict()), SEGMENT.format(axes="SPL")),
        "by_nnunet": ("nnunet", formats.nnunet([5.4, 15.0, 4.6], [60, 16, 78]), SEGMENT.format(axes="SPL")),
    }
    for name, (runtime, files, rest) in made.items():
        model_folder(models, runtime, files, rest, name=name, trusted=runtime in RUNS_CODE)
    running = node(pacs_port=orthanc.dicom_port, models=sorted(made), node=f'models = "{models}"').start()

    storescu(running.port, *series(tmp_path / "ct", "CT of the chest"))
    jobs = running.wait_until_idle(jobs=2 * len(made), seconds=200)

    assert {job["model"]: (job["state"], job["reason"]) for job in jobs} == dict.fromkeys(made, ("done", None))
    assert len(orthanc.files_of("SEG")) == len(orthanc.files_of("SR")) == len(made)


def test_of_two_series_only_the_preferred_one_is_run(node, orthanc, tmp_path):
    models = tmp_path / "models"
    folder_of(models, "torchscript", "w.pt", torchscript(Difference(), tmp_path / "n.pt"), SINGLE, "best")
    running = node(pacs_port=orthanc.dicom_port, models=["best"], node=f'models = "{models}"', settle=3.0).start()
    thick = series(tmp_path / "thick", "thick", brighter=True, SliceThickness="15.0")
    thin = series(tmp_path / "thin", "thin", brighter=True, SliceThickness="1.0")

    storescu(running.port, *thick, *thin)
    wait_for("both jobs", lambda: len(inferences(running)) == 2, seconds=60)
    running.wait_until_idle(jobs=2)

    by_series = {job["series_instance_uid"]: (job["state"], job["reason"]) for job in inferences(running)}
    assert by_series[dcmread(thin[0]).SeriesInstanceUID] == ("done", None)
    assert by_series[dcmread(thick[0]).SeriesInstanceUID] == ("not_applicable", "better_series")


def test_a_radiograph_is_run_through_a_detector_and_its_box_comes_back(node, orthanc, tmp_path):
    models = tmp_path / "models"
    rest = FLAT.format(modality="DX", preparation="")
    folder_of(models, "torchscript", "w.pt", torchscript(Spot(2000.0), tmp_path / "n.pt"), rest, "spots")
    running = node(pacs_port=orthanc.dicom_port, models=["spots"], node=f'models = "{models}"').start()
    text = running.settings_path.read_text().replace('Modality = "CT"', 'Modality = "DX"')
    running.end()
    running.settings_path.write_text(text)
    running.start()

    storescu(running.port, *radiograph(tmp_path))
    jobs = running.wait_until_idle(jobs=2)

    assert {job["state"] for job in jobs} == {"done"}
    [report] = [dcmread(BytesIO(content)) for content in orthanc.files_of("SR")]
    [points] = {tuple(float(one) for one in line) for line in graphics(report)}
    assert (min(points[::2]), max(points[::2]), min(points[1::2]), max(points[1::2])) == (30.0, 42.0, 12.0, 19.0)
    told = json.loads(running.cli("status", "--json").stdout)
    assert told["recent_jobs"][0]["state"] == "done"


def graphics(dataset):
    for element in dataset:
        if element.keyword == "GraphicData":
            yield element.value
        elif element.VR == "SQ":
            for item in element.value:
                yield from graphics(item)
