"""Model folders as a data scientist writes them: networks from files, run on series of every orientation."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dicom_node.catalogue import read_model
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.errors import ModelRefused
from tests.conformance.cases import GEOMETRIES, context
from workers.bundle import Bundle
from workers.findings_of import findings_of
from workers.volume import load
from workers.weights import verify

SMALL = {"slices": 20, "size": (48, 60), "spacing": (14.0, 6.6, 6.0), "noise": 0.0}
HEAD = """
schema = 1
name = "{name}"
version = "2.1.0"
title = "{name}"
manufacturer = "A hospital"
licence = "MIT"
intended_use = "tests"
runtime = "{runtime}"
weights = {{ file = "{file}", sha256 = "{sha256}" }}
"""
SEGMENT = """
[inputs.ct]
modality = ["CT"]
axes = "{axes}"
{preparation}
intensity = {{ clip = [-1000, 1000], scale = "range", to = [-1, 1] }}
[outputs.segments.1]
label = "Bone"
category = {{ value = "91723000", scheme = "SCT", meaning = "Anatomical Structure" }}
type = {{ value = "39607008", scheme = "SCT", meaning = "Lung" }}
colour = [240, 230, 140]
"""
DETECT = """
[inputs.ct]
modality = ["CT"]
axes = "{axes}"
{preparation}
[outputs.boxes]
format = "{format}"
boxes = 0
scores = 1
labels = 2
[outputs.detections.mass]
label = "Mass"
category = {{ value = "49755003", scheme = "SCT", meaning = "Morphologically Abnormal Structure" }}
finding = {{ value = "4147007", scheme = "SCT", meaning = "Mass" }}
colour = [250, 200, 40]
value = 3
threshold = 0.4
"""


class Threshold(torch.nn.Module):
    """Two channels: nothing, and what is bright and brighter than the next voxel on the array's first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(2, 2, 1)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[1, 0] = 100.0
            self.conv.weight[1, 1] = -60.0
            self.conv.bias.copy_(torch.tensor([0.0, -3.03]))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        following = torch.cat([volume[:, :, 1:], volume[:, :, -1:]], dim=2)
        return self.conv(torch.cat([volume, following], dim=1))


class Boxed(torch.nn.Module):
    """The box of what is far brighter than bone, as a detector answers."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = torch.nonzero(volume[0, 0] > 2000.0).to(torch.float32)
        if places.shape[0] == 0:
            return torch.zeros(0, 6), torch.zeros(0), torch.zeros(0)
        low = places.min(dim=0)[0]
        high = places.max(dim=0)[0] + 1.0
        if self.layout == "corners":
            box = torch.cat([low, high])
        elif self.layout == "pairs":
            box = torch.stack([low, high], dim=1).flatten()
        else:
            box = torch.cat([(low + high) / 2.0, high - low])
        near = torch.cat([box[:3] + 0.2, box[3:]]) if self.layout != "pairs" else box + 0.1
        return torch.stack([box, near, box]), torch.tensor([0.9, 0.6, 0.3]), torch.tensor([3, 3, 3])


def folder_of(root: Path, runtime: str, file: str, content: bytes, rest: str, name: str = "network") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / file).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    (folder / "model.toml").write_text(HEAD.format(name=name, runtime=runtime, file=file, sha256=digest) + rest)
    return folder


def torchscript(network: torch.nn.Module, path: Path) -> bytes:
    torch.jit.script(network).save(str(path))
    return path.read_bytes()


def exported(network: torch.nn.Module, path: Path, example: torch.Tensor) -> bytes:
    warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter
    torch.onnx.export(network, (example,), str(path), dynamo=False, dynamic_axes=_DYNAMIC, input_names=["in"])
    return path.read_bytes()


_DYNAMIC = {"in": {2: "a", 3: "b", 4: "c"}}


class InProcess:
    """Loads models as a contained process does, but here: a process for each of a hundred models takes minutes."""

    def get(self, folder: Path) -> Bundle:
        found = read_model(folder)
        verify(found)
        runtime = importlib.import_module(f"workers.runtimes.{found.manifest.runtime}")
        return Bundle(found.manifest, "0" * 64, runtime.load(found.manifest, found.folder, "cpu"))


@pytest.fixture
def bundles():
    return InProcess()


@pytest.fixture(scope="module", params=["axial", "reversed", "sagittal", "coronal", "prone"])
def volume(request, tmp_path_factory):
    phantom = make_thorax(**{**SMALL, **GEOMETRIES[request.param]}, seed=3)
    return load(write_series(phantom, tmp_path_factory.mktemp(request.param)))


def truth(values, axis, step):
    """What the network says, computed on the canonical grid: the next voxel lies `step` further on `axis`."""
    scaled = np.clip(values.astype(np.float64), -1000, 1000) / 1000
    following = np.roll(scaled, -step, axis=axis)
    edge = [slice(None)] * 3
    edge[axis] = slice(-1, None) if step > 0 else slice(0, 1)
    following[tuple(edge)] = scaled[tuple(edge)]
    return 100 * scaled - 60 * following - 3.03 > 0


CASES = {"SPL": (0, 1), "LIA": (2, 1), "RAS": (2, -1), "IPR": (0, -1), "ASR": (1, -1)}


@pytest.mark.parametrize("axes", sorted(CASES))
def test_a_torchscript_network_sees_its_axes_and_answers_voxel_for_voxel(tmp_path, volume, axes, bundles):
    content = torchscript(Threshold(), tmp_path / "n.pt")
    rest = SEGMENT.format(axes=axes, preparation="")
    folder = folder_of(tmp_path, "torchscript", "weights.pt", content, rest)

    prediction = bundles.get(folder).model(volume.grid, lambda part: None)

    wanted = truth(volume.grid.values, *CASES[axes])
    assert 0 < wanted.sum() < wanted.size
    assert np.array_equal(prediction.labels > 0, wanted)
    assert not np.array_equal(prediction.labels > 0, wanted[::-1])
    assert 0.5 < prediction.certainty[1] <= 1.0


def test_an_onnx_network_says_the_same(tmp_path, volume, bundles):
    pytest.importorskip("onnxruntime")
    content = exported(Threshold(), tmp_path / "n.onnx", torch.zeros(1, 1, 8, 8, 8))
    folder = folder_of(tmp_path, "onnx", "net.onnx", content, SEGMENT.format(axes="LIA", preparation=""))

    prediction = bundles.get(folder).model(volume.grid, lambda part: None)

    assert np.array_equal(prediction.labels > 0, truth(volume.grid.values, *CASES["LIA"]))


def test_a_state_dict_fills_the_network_that_the_manifest_names(tmp_path, volume, bundles):
    monai = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(4)
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}
    network = monai.UNet(**arguments).eval()
    torch.save({"state_dict": network.state_dict(), "epoch": 7}, tmp_path / "n.pth")
    written = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    rest = f'architecture = {{ name = "monai.UNet", arguments = {{ {written} }} }}\n'
    rest += SEGMENT.format(axes="RAS", preparation="shape = [64, 48, 24]")
    folder = folder_of(tmp_path, "state_dict", "net.pth", (tmp_path / "n.pth").read_bytes(), rest)

    bundle = bundles.get(folder)
    labels = bundle.model(volume.grid, lambda part: None).labels

    assert labels.shape == volume.grid.shape
    from workers.preparing import prepare

    prepared = prepare(volume.grid, list(bundle.manifest.inputs.items()))
    with torch.inference_mode():
        direct = network(torch.from_numpy(prepared.array)[None])[0].argmax(dim=0).numpy().astype(np.uint8)
    assert np.array_equal(labels, prepared.labels_back(direct))


@pytest.mark.parametrize("layout", ["corners", "pairs", "centre_size"])
@pytest.mark.parametrize(("axes", "spacing"), [("SPL", None), ("LIA", "[5.0, 5.0, 5.0]"), ("RAS", "[6.0, 6.6, 14.0]")])
def test_boxes_of_a_detector_come_back_to_the_lesion(tmp_path, volume, axes, spacing, layout, bundles):
    from dataclasses import replace

    block = tuple(slice(n // 3, n // 3 + max(n // 6, 3)) for n in volume.grid.shape)
    values = volume.grid.values.astype(np.float32).copy()
    values[block] = 4000.0
    made = replace(volume, grid=replace(volume.grid, values=values))
    content = torchscript(Boxed(layout), tmp_path / "n.pt")
    preparation = f"spacing = {spacing}" if spacing else ""
    rest = DETECT.format(axes=axes, preparation=preparation, format=layout)
    folder = folder_of(tmp_path, "torchscript", "weights.pt", content, rest)

    bundle = bundles.get(folder)
    prediction = bundle.model(made.grid, lambda part: None)

    [detection] = prediction.detections  # one overlaps it, one is not sure enough
    assert detection.confidence == pytest.approx(0.9)
    for (first, last), own in zip(detection.box, block, strict=True):
        assert abs(first - own.start) <= (1 if spacing else 0)
        assert abs(last - own.stop) <= (1 if spacing else 0)
    [finding] = findings_of(prediction, made, bundle.manifest, context()).findings
    on_source = made.to_source(np.where(values == 4000.0, 1, 0).astype(np.uint8))[finding.box.frame]
    rows, columns = np.nonzero(on_source)
    assert abs(finding.box.left - columns.min()) <= (1 if spacing else 0)
    assert abs(finding.box.bottom - (rows.max() + 1)) <= (1 if spacing else 0)


def test_windows_give_what_the_whole_gives(tmp_path, volume, bundles):
    content = torchscript(torch.nn.Conv3d(1, 2, 1), tmp_path / "n.pt")
    whole = folder_of(tmp_path, "torchscript", "w.pt", content, SEGMENT.format(axes="SPL", preparation=""), "whole")
    rest = SEGMENT.format(axes="SPL", preparation="") + "[execution]\npatch = [8, 16, 16]\nbatch = 2\nmirror = [2]\n"
    windowed = folder_of(tmp_path, "torchscript", "w.pt", content, rest, "windowed")
    seen = []

    one = bundles.get(whole).model(volume.grid, lambda part: None)
    other = bundles.get(windowed).model(volume.grid, seen.append)

    assert np.array_equal(one.labels, other.labels)
    assert len(seen) > 3
    assert seen[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("runtime", "file", "rest"),
    [
        ("torchscript", "weights.pt", ""),
        ("onnx", "net.onnx", ""),
        ("state_dict", "net.safetensors", 'architecture = { name = "monai.UNet", arguments = {} }\n'),
        ("state_dict", "net.pth", 'architecture = { name = "no_such_network" }\n'),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused_by_name(tmp_path, bundles, runtime, file, rest):
    rest += SEGMENT.format(axes="SPL", preparation="")
    folder = folder_of(tmp_path, runtime, file, b"this is no network", rest)

    with pytest.raises(ModelRefused, match=r"network|architecture"):
        bundles.get(folder)


def test_too_few_channels_are_refused(tmp_path, volume, bundles):
    content = torchscript(torch.nn.Conv3d(1, 1, 1), tmp_path / "n.pt")
    folder = folder_of(tmp_path, "torchscript", "w.pt", content, SEGMENT.format(axes="SPL", preparation=""))

    with pytest.raises(ModelRefused, match="channels"):
        bundles.get(folder).model(volume.grid, lambda part: None)
