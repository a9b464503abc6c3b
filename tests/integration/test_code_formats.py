"""Formats that can run code give what their networks give, on series of every orientation."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from dicom_node.demo.phantom import dice, make_thorax, write_series
from dicom_node.errors import ModelRefused, SettingsError
from tests import hostile
from tests.conformance.cases import GEOMETRIES
from tests.integration import formats
from tests.integration.formats import DETECT, SEGMENT, model_folder
from workers.bundle import Bundles
from workers.containment import Walls, walls
from workers.volume import load

SMALL = {"slices": 20, "size": (48, 64), "spacing": (12.0, 6.6, 5.6), "noise": 0.0}


def nothing(part: float) -> None:
    """A progress that nobody watches."""


@pytest.fixture(scope="module")
def bundles():
    made = Bundles(device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function like `model_folder`; what is the same is written once, so that its process sees many series."""
    made = {}

    def write(runtime, files, rest):
        key = runtime, rest, tuple(sorted(files.items()))
        if key not in made:
            made[key] = model_folder(tmp_path_factory.mktemp(runtime), runtime, files, rest)
        return made[key]

    return write


@pytest.fixture(scope="module", params=["axial", "reversed", "sagittal", "oblique", "tilted"])
def volume(request, tmp_path_factory):
    phantom = make_thorax(**{**SMALL, **GEOMETRIES[request.param]}, seed=3)
    return load(write_series(phantom, tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module", params=["reversed", "sagittal"])
def regular(request, tmp_path_factory):
    phantom = make_thorax(**{**SMALL, **GEOMETRIES[request.param]}, seed=3)
    return load(write_series(phantom, tmp_path_factory.mktemp(request.param)))


def lies_on(labels, wanted):
    """Labels that were resampled are where they should be: mirrored, or moved by a voxel, they fit worse."""
    mask = labels.astype(bool)
    fits = dice(mask, wanted)
    assert fits > 0.92
    for axis in range(3):
        assert dice(np.flip(mask, axis), wanted) < fits - 0.001
        for step in (-1, 1):
            assert dice(np.roll(mask, step, axis), wanted) < fits - 0.001


# -- .pt2 ---------------------------------------------------------------------------------------------------------


class Edge(torch.nn.Module):
    """Label 1 where a voxel is much brighter than the one before on the array's first axis."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        before = torch.cat([volume[:, :, :1], volume[:, :, :-1]], dim=2)
        return (volume - before > 200.0).to(torch.float32)


def test_an_exported_network_sees_its_axes_and_answers_voxel_for_voxel(written, regular, bundles):
    content = formats.exported(Edge(), torch.zeros(1, 1, 8, 10, 12))
    folder = written("pt2", {"net.pt2": content}, SEGMENT.format(axes="RAS"))

    labels = bundles.get(folder).model(regular.grid, nothing).labels

    values = regular.grid.values.astype(np.float32)
    before = np.concatenate([values[:, :, 1:], values[:, :, -1:]], axis=2)  # to the right is towards the small index
    wanted = values - before > 200
    assert 0 < wanted.sum() < wanted.size
    assert np.array_equal(labels > 0, wanted)


def test_a_file_that_is_no_export_is_refused_by_name(tmp_path, bundles):
    folder = model_folder(tmp_path, "pt2", {"net.pt2": b"no archive"}, SEGMENT.format(axes="SPL"))

    with pytest.raises(ModelRefused, match=r"net\.pt2"):
        bundles.get(folder)


# -- nnU-Net ------------------------------------------------------------------------------------------------------

AXES = {"SPL": ((0, 1, 2), (1, 1, 1)), "SAR": ((0, 1, 2), (1, -1, -1)), "LIA": ((2, 0, 1), (1, -1, -1))}


def edges_before(values: np.ndarray, axes: str) -> np.ndarray:
    """What the network of formats.nnunet says, by hand: it looks along the second axis, as its plans swap two."""
    order, signs = AXES[axes]
    scaled = (np.clip(values.astype(np.float64), -1000, 1000) - formats.MEAN) / formats.DEVIATION
    axis, sign = order[1], signs[1]
    before = np.roll(scaled, sign, axis=axis)
    edge = [slice(None)] * 3
    edge[axis] = slice(0, 1) if sign > 0 else slice(-1, None)
    before[tuple(edge)] = 0.0  # a convolution pads with zeros
    return scaled - before > formats.STEP


@pytest.mark.parametrize("axes", sorted(AXES))
def test_an_nnunet_folder_gives_what_its_network_gives(written, regular, axes, bundles):
    pytest.importorskip("nnunetv2")
    order, _ = AXES[axes]
    shape, spacing = ([list(what)[axis] for axis in order] for what in (regular.grid.shape, regular.grid.spacing))
    files = formats.nnunet([spacing[n] for n in (1, 0, 2)], [shape[n] for n in (1, 0, 2)])
    folder = written("nnunet", files, SEGMENT.format(axes=axes))
    seen = []

    labels = bundles.get(folder).model(regular.grid, seen.append).labels

    wanted = edges_before(regular.grid.values, axes)
    assert 100 < wanted.sum() < wanted.size / 2
    assert (labels.astype(bool) == wanted).mean() > 0.9995  # nnU-Net adds up in half precision
    assert dice(labels.astype(bool), wanted) > 0.99
    assert seen[-1] == 1.0


def test_an_nnunet_folder_resamples_every_axis_by_its_own_spacing(written, volume, bundles):
    pytest.importorskip("nnunetv2")
    files = formats.nnunet([5.0, 9.0, 4.0], [48, 32, 48], step=False)
    folder = written("nnunet", files, SEGMENT.format(axes="SPL"))

    labels = bundles.get(folder).model(volume.grid, nothing).labels

    wanted = volume.grid.values > formats.MEAN
    lies_on(labels, wanted)


def test_the_channels_of_an_nnunet_are_the_inputs_in_their_order(tmp_path, regular, bundles):
    pytest.importorskip("nnunetv2")
    from dataclasses import replace

    grid = regular.grid
    files = formats.nnunet(list(grid.spacing), list(grid.shape), channels=2, reads=1, step=False)
    files["plans.json"] = files["plans.json"].replace(b"[1, 0, 2]", b"[0, 1, 2]")
    rest = SEGMENT.format(axes="SPL") + '[inputs.second]\nmodality = ["CT"]\n'
    folder = model_folder(tmp_path, "nnunet", files, rest)
    other = np.roll(grid.values, (3, 5, 7), axis=(0, 1, 2)).astype(np.float32)

    labels = bundles.get(folder).model(replace(grid, others={"second": other}), nothing).labels

    assert dice(labels.astype(bool), other > formats.MEAN) > 0.99
    assert dice(labels.astype(bool), grid.values > formats.MEAN) < 0.95


def test_mirrored_nnunets_are_the_mean_of_what_they_say(tmp_path, regular, bundles):
    """An edge seen from both sides: mirrored along the axis it looks along, a step up becomes a step down."""
    pytest.importorskip("nnunetv2")
    grid = regular.grid
    shape, spacing = list(grid.shape), list(grid.spacing)
    files = formats.nnunet([spacing[n] for n in (1, 0, 2)], [shape[n] for n in (1, 0, 2)])
    rest = SEGMENT.format(axes="SPL") + "[execution]\nmirror = [0]\n"
    plain = model_folder(tmp_path, "nnunet", files, SEGMENT.format(axes="SPL"), name="plain")
    mirrored = model_folder(tmp_path, "nnunet", files, rest, name="mirrored")

    one = bundles.get(plain).model(grid, nothing).labels.astype(bool)
    both = bundles.get(mirrored).model(grid, nothing).labels.astype(bool)

    inner = np.s_[:, 1:-1, :]
    assert not np.array_equal(one[inner], both[inner])


def test_an_nnunet_folder_without_its_plans_is_refused_by_name(tmp_path, bundles):
    pytest.importorskip("nnunetv2")
    files = formats.nnunet([5.0, 5.0, 5.0], [16, 16, 16])
    del files["plans.json"]
    folder = model_folder(tmp_path, "nnunet", files, SEGMENT.format(axes="SPL"))

    with pytest.raises(ModelRefused, match=r"plans\.json"):
        bundles.get(folder)


def test_totalsegmentator_answers_on_the_voxels_of_the_grid_and_starts_nothing(written, regular, bundles):
    pytest.importorskip("totalsegmentator")
    trained = "Dataset297_TotalSegmentator_total_3mm_1559subj/nnUNetTrainer_4000epochs_NoMirroring__nnUNetPlans"
    own = formats.nnunet([3.0, 3.0, 3.0], [64, 64, 64], step=False)
    files = {f"{trained}__3d_fullres/{name}": content for name, content in own.items()}
    rest = 'parameters = { task = "total", fast = true }\n' + SEGMENT.format(axes="SPL")
    folder = written("totalsegmentator", files, rest)

    labels = bundles.get(folder).model(regular.grid, nothing).labels

    lies_on(labels, regular.grid.values > formats.MEAN)


# -- MONAI --------------------------------------------------------------------------------------------------------


def in_ras(values: np.ndarray) -> torch.Tensor:
    """The array that a bundle's network sees: x to the right, y to the front, z to the head, scaled."""
    turned = values.astype(np.float32).transpose(2, 1, 0)[::-1, ::-1]
    return torch.from_numpy(np.ascontiguousarray((np.clip(turned, -1000, 1000) + 1000) / 2000))


def from_ras(values: np.ndarray) -> np.ndarray:
    return values[::-1, ::-1].transpose(2, 1, 0)


def test_a_monai_segmentation_bundle_gives_what_its_network_gives(written, regular, bundles):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(11)
    network = nets.UNet(**formats.UNET)
    network = network.eval()
    files = formats.monai_segmentation(network.state_dict())
    rest = SEGMENT.format(axes="LIA").replace("axes =", "spacing = [9, 9, 9]\naxes =")  # the bundle has its own
    folder = written("monai_bundle", files, rest)

    labels = bundles.get(folder).model(regular.grid, nothing).labels

    with torch.inference_mode():
        direct = network(in_ras(regular.grid.values)[None, None])[0].argmax(dim=0).numpy()
    wanted = from_ras(direct)
    assert 0.02 < wanted.mean() < 0.98
    assert (labels == wanted).mean() > 0.9999
    assert (labels[:, :, ::-1] == wanted).mean() < 0.99


def test_a_monai_bundle_that_resamples_comes_back_onto_the_voxels(written, volume, bundles):
    nets = pytest.importorskip("monai.networks.nets")
    network = nets.UNet(**formats.UNET)
    state = network.state_dict()
    files = formats.monai_segmentation(state, pixdim=[4.0, 4.0, 4.0])
    # a bundle whose network is a threshold: what is brighter than -200 HU
    text = files["configs/inference.json"].decode()
    start, end = text.index('"network_def": {'), text.index('"network":')
    threshold = '"network_def": {"_target_": "scripts.net.Threshold"}, '
    files["configs/inference.json"] = (text[:start] + threshold + text[end:]).encode()
    files["scripts/__init__.py"] = b""
    files["scripts/net.py"] = (
        b"import torch\n\n\nclass Threshold(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        b"        self.edge = torch.nn.Parameter(torch.tensor(0.5))\n\n    def forward(self, volume):\n"
        b"        return torch.cat([self.edge - volume, volume - self.edge], dim=1) * 20\n"
    )
    files["models/model.pt"] = formats.saved({"edge": torch.tensor(0.4)})
    folder = written("monai_bundle", files, SEGMENT.format(axes="SPL"))

    labels = bundles.get(folder).model(volume.grid, nothing).labels

    wanted = volume.grid.values > -200
    lies_on(labels, wanted)


@pytest.mark.filterwarnings("ignore:__array_wrap__")  # MONAI's own
@pytest.mark.parametrize("extractor", ["own", "published"])
@pytest.mark.parametrize(("lps", "mode"), [(True, "cccwhd"), (False, "xyzxyz")])
def test_a_monai_detection_bundle_gives_its_boxes_in_the_voxels_of_the_grid(
    written, regular, lps, mode, extractor, bundles
):
    pytest.importorskip("monai.apps.detection")
    detector = small_detector(extractor)
    state = detector.network.state_dict()
    files = formats.monai_detection(state, extractor=extractor, lps=lps, mode=mode)
    folder = written("monai_bundle", files, DETECT)

    found = bundles.get(folder).model(regular.grid, nothing).detections

    with torch.inference_mode():
        [direct] = detector([in_ras(regular.grid.values)[None]])
    sure = [
        (float(score), within(box.tolist(), regular.grid.shape))
        for score, box in zip(direct["label_scores"], direct["box"], strict=True)
        if score >= 0.5
    ]
    assert len(found) > 1
    assert len(found) <= len(sure)
    for detection in found:
        as_sure = [box for score, box in sure if detection.confidence == pytest.approx(score, abs=1e-4)]
        box = min(as_sure, key=lambda one: away(detection.centre, centre_on_grid(one, regular.grid.shape)))
        assert np.allclose(detection.centre, centre_on_grid(box, regular.grid.shape), atol=0.05)
        for (first, last), (low, high) in zip(detection.box, on_grid(box, regular.grid.shape), strict=True):
            assert abs(first - max(low, 0)) <= 1.0
            assert abs(last - high) <= 1.0
    mirrored = [centre_on_grid(box, regular.grid.shape)[::-1] for _, box in sure]
    assert not any(np.allclose(found[0].centre, other, atol=0.5) for other in mirrored)


def small_detector(extractor):
    """The published detector in small, with weights that find several things in anything."""
    from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
    from monai.apps.detection.networks.retinanet_network import RetinaNet
    from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape

    torch.manual_seed(5)
    network = RetinaNet(3, 1, 1, extractor_of(extractor), size_divisible=[16, 16, 8])
    with torch.no_grad():
        head = network.classification_head.cls_logits
        head.bias.zero_()
        head.weight.mul_(30.0)
    detector = RetinaNetDetector(network, AnchorGeneratorWithAnchorShape(**formats.ANCHORS))
    detector.set_target_keys(box_key="box", label_key="label")
    detector.set_box_selector_parameters(
        score_thresh=0.02, topk_candidates_per_level=1000, nms_thresh=0.22, detections_per_img=300
    )
    return detector.eval()


def extractor_of(name):
    if name == "own":
        scope = {}
        exec(formats.EXTRACTOR, scope)
        return scope["Extractor"]()
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        pytest.skip("the published backbone needs a torchvision that was built for this torch")
    from monai.bundle import ConfigParser

    return ConfigParser({"extractor": formats.EXTRACTORS[name]}).get_parsed_content("extractor")


def away(one, other):
    return float(np.linalg.norm(np.subtract(one, other)))


def within(box, shape):
    """The part of a box over the array in RAS that lies in it, as the bundle clips it."""
    sizes = (*shape[::-1], *shape[::-1])
    return [min(max(edge, 0.0), float(size)) for edge, size in zip(box, sizes, strict=True)]


def centre_on_grid(box, shape):
    """The centre (k, j, i) of a box over the array in RAS, by hand."""
    x, y, z = ((box[axis] + box[axis + 3]) / 2 for axis in range(3))
    return (z, shape[1] - 1 - y, shape[2] - 1 - x)


def on_grid(box, shape):
    """The edges (k, j, i) of a box over the array in RAS, by hand."""
    half = [(box[axis + 3] - box[axis]) / 2 for axis in (2, 1, 0)]
    centre = centre_on_grid(box, shape)
    return [(max(c + 0.5 - h, 0), min(c + 0.5 + h, n)) for c, h, n in zip(centre, half, shape, strict=True)]


# -- what is hidden in a file -------------------------------------------------------------------------------------


class Hidden:
    """A pickle that runs code where it is read."""

    def __init__(self, source):
        self.source = source

    def __reduce__(self):
        return exec, (self.source, {})


def export_with(source):
    """A sound export whose sample inputs, which torch.export.load unpickles, hide code."""
    sound = io.BytesIO(formats.exported(Edge(), torch.zeros(1, 1, 8, 10, 12)))
    made = io.BytesIO()
    with zipfile.ZipFile(sound) as old, zipfile.ZipFile(made, "w") as new:
        inputs = [name for name in old.namelist() if "/data/sample_inputs/" in name]
        assert inputs
        for name in old.namelist():
            new.writestr(name, formats.saved(Hidden(source)) if name in inputs else old.read(name))
    return {"net.pt2": made.getvalue()}


def bundle_with(source):
    """A sound bundle with one expression more."""
    state = pytest.importorskip("monai.networks.nets").UNet(**formats.UNET).state_dict()
    files = formats.monai_segmentation(state)
    config = json.loads(files["configs/inference.json"])
    config["inferer"] = f"$__import__('builtins').exec({source!r}, {{}}) or monai.inferers.SimpleInferer()"
    return files | {"configs/inference.json": json.dumps(config).encode()}


def nnunet_with(source):
    """A sound folder whose checkpoint has one thing more."""
    pytest.importorskip("nnunetv2")
    files = formats.nnunet([5.0, 5.0, 5.0], [16, 16, 16])
    checkpoint = torch.load(io.BytesIO(files["fold_0/checkpoint_final.pth"]), weights_only=False)
    return files | {"fold_0/checkpoint_final.pth": formats.saved(checkpoint | {"optimizer_state": Hidden(source)})}


INFECTED = {"pt2": export_with, "monai_bundle": bundle_with, "nnunet": nnunet_with}
needs_walls = pytest.mark.skipif(bool(walls().missing), reason=f"this kernel lacks {walls().missing}")


@pytest.mark.parametrize("runtime", sorted(INFECTED))
@needs_walls
def test_code_that_is_hidden_in_a_trusted_file_runs_and_gets_nowhere(tmp_path, runtime, bundles):
    with hostile.place(tmp_path) as place:
        files = INFECTED[runtime](place.source(severe=True))
        folder = model_folder(tmp_path, runtime, files, SEGMENT.format(axes="SPL"))

        with pytest.raises(ModelRefused) as refused:
            bundles.get(folder)

        assert set(str(refused.value).split("succeeded: ")[1].split()) == hostile.ALLOWED
        assert place.is_untouched()


@pytest.mark.parametrize("runtime", sorted(INFECTED))
@pytest.mark.parametrize(
    ("source", "seconds", "said"),
    [  # on a slow machine it takes 12 s to import a library
        ("held = []\nwhile True: held.append(b'x' * (1 << 24))", 300, r"limits\.memory_megabytes = 1200"),
        ("while True: pass", 12, r"limits\.seconds = 12"),
        ("import ctypes; ctypes.string_at(0)", 300, "died"),
    ],
    ids=["memory", "loop", "crash"],
)
@needs_walls
def test_code_that_is_hidden_in_a_trusted_file_ends_itself_alone(tmp_path, runtime, source, seconds, said, bundles):
    rest = f"limits = {{ memory_megabytes = 1200, seconds = {seconds} }}\n" + SEGMENT.format(axes="SPL")
    folder = model_folder(tmp_path, runtime, INFECTED[runtime](source), rest)

    with pytest.raises(ModelRefused, match=said):
        bundles.get(folder)


@pytest.mark.parametrize("runtime", sorted(INFECTED))
def test_without_trust_no_file_of_it_is_opened(tmp_path, runtime, bundles):
    marker = tmp_path / "ran"
    files = INFECTED[runtime](f"open({str(marker)!r}, 'w')")
    folder = model_folder(tmp_path, runtime, files, SEGMENT.format(axes="SPL"), trusted=False)
    for file in files:  # whoever opens one of them waits for ever
        (folder / file).unlink()
        os.mkfifo(folder / file)

    with pytest.raises(SettingsError, match="trusted"):
        bundles.get(folder)

    assert not marker.exists()


def test_one_byte_changed_is_refused_at_every_load_and_a_security_event(tmp_path, regular, bundles):
    files = {"net.pt2": formats.exported(Edge(), torch.zeros(1, 1, 8, 10, 12))}
    folder = model_folder(tmp_path, "pt2", files, SEGMENT.format(axes="SPL"))
    bundle = bundles.get(folder)
    sound = bundle.model(regular.grid, nothing).labels
    content = bytearray(files["net.pt2"])
    content[len(content) // 2] ^= 1
    (folder / "net.pt2").write_bytes(content)

    still = bundle.model(regular.grid, nothing).labels  # what was verified is what runs
    bundle.model.end()
    with capture_logs() as logs, pytest.raises(ModelRefused, match="is not the file that the manifest names"):
        bundle.model(regular.grid, nothing)

    assert np.array_equal(still, sound)
    assert ("critical", "model.tampered") in [(line["log_level"], line["event"]) for line in logs]


def test_what_runs_no_code_runs_without_walls_too_and_that_is_said_once(tmp_path, regular):
    content = io.BytesIO()
    torch.jit.save(torch.jit.trace(Edge(), torch.zeros(1, 1, 8, 10, 12)), content)
    rest = SEGMENT.format(axes="SPL")
    first, second = (
        model_folder(tmp_path, "torchscript", {"net.pt": content.getvalue()}, rest, name=name)
        for name in ("first", "second")
    )
    bundles = Bundles(device="cpu", found=Walls(0, seccomp=False))

    with capture_logs() as logs:
        for folder in (first, second):
            assert bundles.get(folder).model(regular.grid, nothing).labels.any()
    bundles.close()

    assert [line["log_level"] for line in logs if line["event"] == "model.not_contained"] == ["warning"]


def test_a_file_that_the_manifest_does_not_name_is_not_there(tmp_path, bundles):
    """A script beside the bundle that nobody approved is not what runs."""
    pytest.importorskip("monai.bundle")
    files = bundle_with("import scripts.unapproved")
    folder = model_folder(tmp_path, "monai_bundle", files, SEGMENT.format(axes="SPL"))
    (folder / "scripts").mkdir(exist_ok=True)
    (folder / "scripts" / "unapproved.py").write_text("")

    with pytest.raises(ModelRefused, match=r"cannot be built here"):
        bundles.get(folder)
