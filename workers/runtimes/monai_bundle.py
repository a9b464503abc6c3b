"""MONAI bundles: the folder with configs/inference.json, run by its own preprocessing, inferer and postprocessing.

The configuration is code; it and every script and weights file of it are named under `weights`, with their digests.
Of `parameters` there are `config` (default `configs/inference.json`; `.yaml` will do), `image_key`, `pred_key`, and for
detectors `box_key`, `label_key` and `score_key`. Savers and whatever loads truth are left out of the configuration.

A segmentation of one channel has label values; of several, the largest is taken, or with `activation = "sigmoid"`
each that is above `threshold`. Boxes are those of MONAI: their coordinates are of voxel centres, as an affine has
them, in the mode and space that the postprocessing brings them to.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dicom_node.errors import ModelRefused, NodeError, NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import Intensity, Manifest
from workers.affine import Matrix, ras_affine, regular
from workers.answering import Found, detections, labelled, surest
from workers.device import choose_device
from workers.network import settle
from workers.prediction import Grid, Model, Prediction, Progress
from workers.preparing import Prepared, prepare
from workers.provenance import digest_of_networks

_AS_IT_IS = {"axes": "SPL", "spacing": None, "shape": None, "intensity": Intensity()}  # the bundle prepares it itself
_KEYS = {"image": "image", "pred": "pred", "box": "box", "label": "label", "score": "label_scores"}
_SURE = 60.0  # a logit that is a yes
_FOLDERS = ("dataset_dir", "output_dir", "data_file_base_dir")
_WEIGHTS = (".pt", ".pth")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SAME = 1e-3  # mm


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the bundle as a model; raise ModelRefused where it has no inference, or its parts do not fit."""
    try:
        import nibabel  # noqa: F401 - what MONAI reads a volume with
        from monai.bundle.config_parser import ConfigParser
    except ModuleNotFoundError as error:
        raise ModelRefused(f"{manifest.name}: runtime monai_bundle needs pip install 'dicom-node[monai]'") from error
    where = torch.device(choose_device(device))
    file = str(manifest.parameters.get("config", "configs/inference.json"))
    if not (folder / file).is_file():
        raise ModelRefused(f"{manifest.name}: weights: {file} belongs to a MONAI bundle and is not listed")
    sys.path.insert(0, str(folder))  # its own `scripts`
    try:
        config = _for_the_node(ConfigParser.load_config_file(folder / file), folder, where, _key(manifest, "image"))
        return _Bundle(manifest, config, ConfigParser(config), folder, where)
    except (NodeError, MemoryError):
        raise
    except Exception as error:  # what an expression of a configuration raises, or MONAI in building it
        raise ModelRefused(f"{manifest.name}: {file} cannot be built here ({type(error).__name__})") from error


def _key(manifest: Manifest, name: str) -> str:
    return str(manifest.parameters.get(f"{name}_key", _KEYS[name]))


# -- the configuration --------------------------------------------------------------------------------------------


def _for_the_node(config: dict[str, Any], folder: Path, device: torch.device, image: str) -> dict[str, Any]:
    """Return a configuration that reads one image of ours and saves nothing."""
    changed = dict(config) | {"bundle_root": str(folder), "device": f"$torch.device('{device}')"}
    changed |= {name: str(folder) for name in _FOLDERS if name in config}
    for part in ("preprocessing", "postprocessing"):
        if isinstance(config.get(part), dict) and isinstance(config[part].get("transforms"), list):
            kept = [_read_by_us(one, image) for one in config[part]["transforms"] if _is_wanted(one, part, image)]
            changed[part] = config[part] | {"transforms": kept}
    return changed


def _is_wanted(transform: Any, part: str, image: str) -> bool:
    """Return whether a transform concerns the image or the answer, and is no saver."""
    if _target(transform).startswith("Save"):
        return False
    return part != "preprocessing" or image in _listed(transform, "keys", image)


def _read_by_us(transform: Any, image: str) -> Any:
    """Return a transform without other keys than the image's among several; the image is NIfTI, in R, A, S."""
    if not isinstance(transform, dict):
        return transform
    changed = dict(transform)
    keys = _listed(transform, "keys", image)
    if len(keys) > 1 and image in keys:
        place = keys.index(image)
        several = {name: value[place] for name, value in transform.items() if _is_one_each(value, keys)}
        changed |= several | {"keys": image}
    if _target(transform).startswith("LoadImage"):
        changed["reader"] = "NibabelReader"
        changed.pop("affine_lps_to_ras", None)
    return changed


def _is_one_each(value: Any, keys: Sequence[Any]) -> bool:
    return isinstance(value, list) and len(value) == len(keys)


def _listed(transform: Any, name: str, default: str) -> list[Any]:
    value = transform.get(name, default) if isinstance(transform, dict) else default
    return list(value) if isinstance(value, list) else [value]


def _target(transform: Any) -> str:
    return str(transform.get("_target_", "")).rsplit(".", 1)[-1] if isinstance(transform, dict) else ""


def _after(config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the transform `name` of the postprocessing."""
    part = config.get("postprocessing")
    transforms = part.get("transforms", []) if isinstance(part, dict) else []
    return next((one for one in transforms if _target(one) in (name, f"{name}ict")), None)


# -- the model ----------------------------------------------------------------------------------------------------


class _Bundle:
    """A bundle whose parts have been built."""

    def __init__(
        self, manifest: Manifest, config: dict[str, Any], parser: Any, folder: Path, device: torch.device
    ) -> None:
        from monai.inferers.inferer import SimpleInferer

        self._manifest = manifest
        self._config = config
        self._device = device
        self._amp = bool(config.get("amp", False)) and device.type == "cuda"
        network = parser.get_parsed_content("network" if "network" in config else "network_def")
        _fill(manifest, network, folder)
        self._network = network.to(device).eval()
        evaluator = config.get("evaluator")
        for needed in _listed(evaluator, "_requires_", "") if isinstance(evaluator, dict) else []:
            if str(needed).startswith("@"):
                parser.get_parsed_content(str(needed)[1:])
        self._before: Any = parser.get_parsed_content("preprocessing")
        self._inferer: Any = parser.get_parsed_content("inferer") if "inferer" in config else SimpleInferer()
        self._after: Any = parser.get_parsed_content("postprocessing") if "postprocessing" in config else dict

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Predict; the channels of the image are the manifest's inputs in their order."""
        if not grid.placed:
            raise NotApplicable(Reason.GEOMETRY_UNUSABLE, "frames without a place in the patient")
        settle(self._manifest.seed)
        slots = [(name, slot.model_copy(update=_AS_IT_IS)) for name, slot in self._manifest.inputs.items()]
        slots[0] = slots[0][0], regular(grid, slots[0][1])
        prepared = prepare(grid, slots)
        affine = ras_affine(prepared)
        autocast = torch.autocast(self._device.type, enabled=self._amp)
        with tempfile.TemporaryDirectory() as scratch, torch.inference_mode(), autocast:
            item = self._before({self._key("image"): _written(prepared.array, affine, Path(scratch))})
            if self._manifest.outputs.detections:
                return self._boxes(item, prepared, affine, progress)
            return self._mask(item, prepared, affine, progress)

    def _key(self, name: str) -> str:
        return _key(self._manifest, name)

    # -- masks ------------------------------------------------------------------------------------------------

    def _mask(self, item: dict[str, Any], prepared: Prepared, affine: Matrix, progress: Progress) -> Prediction:
        pred = self._key("pred")
        image = item[self._key("image")]
        answer = self._inferer(image[None].to(self._device), self._network)
        answer = answer[0] if isinstance(answer, (list, tuple)) else answer
        progress(0.9)
        done = self._after({**item, pred: answer[0]})
        scores = self._on_the_image(done, item, prepared.array.shape[:0:-1], affine)
        layers = [prepared.labels_back(layer) for layer in self._labels(scores)]
        progress(1.0)
        return Prediction(
            labels=layers[0], overlapping=tuple(layers[1:]), parameters={"seed": str(self._manifest.seed)}
        )

    def _on_the_image(
        self, done: dict[str, Any], item: dict[str, Any], shape: tuple[int, ...], affine: Matrix
    ) -> npt.NDArray[np.float32]:
        """Return the answer `(channels, k, j, i)` on the voxels that the bundle was given."""
        from monai.data.meta_tensor import MetaTensor
        from monai.transforms.post.dictionary import Invertd

        pred = self._key("pred")
        answer = done[pred]
        there = np.asarray(answer.affine) if isinstance(answer, MetaTensor) else affine
        if tuple(answer.shape[1:]) != shape or not np.allclose(there, affine, atol=_SAME):
            image = self._key("image")
            answer = Invertd(pred, self._before, orig_keys=image, nearest_interp=True, to_tensor=True)(
                {pred: answer, image: item[image]}
            )[pred]
        if tuple(answer.shape[1:]) != shape:
            raise ModelRefused(f"{self._manifest.name}: the bundle answers {tuple(answer.shape[1:])} to {shape}")
        values = torch.as_tensor(answer).detach().cpu().float().numpy()
        return np.ascontiguousarray(values.transpose(0, 3, 2, 1))

    def _labels(self, scores: npt.NDArray[np.float32]) -> Sequence[npt.NDArray[np.uint8]]:
        outputs = self._manifest.outputs
        if len(scores) == 1 and outputs.activation != "sigmoid":
            values = scores[0].round()
            return [np.where(np.isin(values, list(outputs.segments)), values, 0).astype(np.uint8)]
        if outputs.activation == "sigmoid":  # what the bundle has made of its channels: probabilities, or yes and no
            scores = np.where(scores > outputs.threshold, _SURE, -_SURE).astype(np.float32)
        return labelled(scores, outputs).layers

    # -- boxes ------------------------------------------------------------------------------------------------

    def _boxes(self, item: dict[str, Any], prepared: Prepared, affine: Matrix, progress: Progress) -> Prediction:
        image = item[self._key("image")].to(self._device)
        answers = self._inferer([image], self._network)
        answer = answers[0] if isinstance(answers, (list, tuple)) else answers
        progress(0.9)
        # what a detector finds nothing in has no boxes to transform
        done = self._after({**answer, self._key("image"): image}) if len(answer[self._key("box")]) else answer
        found = Found(
            self._corners(done[self._key("box")], np.asarray(image.affine, float), affine),
            _array(done[self._key("score")]).reshape(-1),
            _array(done[self._key("label")]).reshape(-1).astype(np.int64),
        )
        outputs = self._manifest.outputs
        progress(1.0)
        return Prediction(
            detections=detections(surest(found, outputs), prepared, outputs),
            parameters={"seed": str(self._manifest.seed)},
        )

    def _corners(self, boxes: Any, preprocessed: Matrix, affine: Matrix) -> npt.NDArray[np.float64]:
        """Return boxes `(n, 2, 3)` in voxel edges of the grid's axes (k, j, i), least and greatest."""
        from monai.data.box_utils import convert_box_mode

        mode = (_after(self._config, "ConvertBoxModed") or {}).get("dst_mode", "xyzxyz")
        standard: Any = convert_box_mode(
            torch.as_tensor(_array(boxes).reshape(-1, 6)), src_mode=mode, dst_mode="xyzxyz"
        )
        corners = standard.numpy().reshape(-1, 2, 3)
        world = _after(self._config, "AffineBoxToWorldCoordinated")
        space = preprocessed if world is None else _LPS_TO_RAS if world.get("affine_lps_to_ras") else np.eye(4)
        return _in_voxels(corners, np.linalg.inv(affine) @ space)[:, :, ::-1]


def _in_voxels(corners: npt.NDArray[np.float64], matrix: Matrix) -> npt.NDArray[np.float64]:
    """Return boxes `(n, 2, 3)` moved by a matrix: centres truly, lengths to the axis that each is nearest to."""
    centres = corners.mean(axis=1) @ matrix[:3, :3].T + matrix[:3, 3]
    lengths = np.abs(corners[:, 1] - corners[:, 0])
    nearest = np.abs(matrix[:3, :3]).argmax(axis=1)
    half = lengths[:, nearest] * np.linalg.norm(matrix[:3, :3], axis=1) / 2
    return np.stack([centres - half, centres + half], axis=1) + 0.5  # voxel 0 has its centre at 0 and its edge at -0.5


def _array(values: Any) -> npt.NDArray[np.float64]:
    return torch.as_tensor(values).detach().cpu().double().numpy()


def _fill(manifest: Manifest, network: torch.nn.Module, folder: Path) -> None:
    """Load the weights, without running anything that is hidden in them; raise ModelRefused where they do not fit."""
    files = [weights.file for weights in manifest.weights if weights.file.endswith(_WEIGHTS)]
    if not files:
        raise ModelRefused(f"{manifest.name}: weights: name the bundle's weights, models/model.pt")
    try:
        read: Any = torch.load(folder / files[0], map_location="cpu", weights_only=True)
        for key in ("model", "state_dict", "network"):
            if isinstance(read, dict) and isinstance(read.get(key), dict):
                read = read[key]
        network.load_state_dict(read)
    except MemoryError:
        raise
    except Exception as error:  # an unpickler that refuses, keys that differ
        raise ModelRefused(f"{manifest.name}: {files[0]} does not fit the bundle's network") from error


def _written(array: npt.NDArray[np.float32], affine: Matrix, folder: Path) -> str | list[str]:
    """Write each channel `(k, j, i)` as NIfTI; return the path, or the paths of several."""
    import nibabel

    library: Any = nibabel  # untyped
    paths = []
    for number, channel in enumerate(array):
        image = library.Nifti1Image(np.ascontiguousarray(channel.T), affine)
        paths.append(str(folder / f"{number}.nii"))
        library.save(image, paths[-1])
    return paths[0] if len(paths) == 1 else paths


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the code that runs it."""
    return digest_of_networks()
