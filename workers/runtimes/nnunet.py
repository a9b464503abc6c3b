"""nnU-Net v2: the folder of a trained model, with plans.json, dataset.json and fold_N/checkpoint_final.pth.

All of these are named under `weights`, with their digests. nnU-Net resamples, normalises and cuts windows itself, by
its plans. `axes` of the first input says how the images of the training lay, as nnU-Net's arrays had them; of
`execution` it takes `overlap`, `blend` and `mirror` (of nnU-Net's own axes those that were trained for).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.affine import regular
from workers.device import choose_device
from workers.network import settle
from workers.prediction import Grid, Model, Prediction, Progress
from workers.preparing import Prepared, prepare
from workers.provenance import digest_of_networks

_CHECKPOINT = re.compile(r"^fold_(\d+|all)/([\w.-]+\.pth)$")
_REORIENTING = "NibabelIOWithReorient"  # its arrays are always slices, rows, columns of an image in RAS
_RAS = "SAR"


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the trained model in `folder`; raise ModelRefused where it is not complete."""
    # nnU-Net asks the host's name, with a program of the system, unless it is told how many processes there may be
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": str(torch.get_num_threads())}
    try:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    except ModuleNotFoundError as error:
        raise ModelRefused(f"{manifest.name}: runtime nnunet needs pip install 'dicom-node[nnunet]'") from error
    folds, checkpoint = _folds(manifest)
    where = torch.device(choose_device(device))
    predictor = nnUNetPredictor(
        tile_step_size=1 - manifest.execution.overlap,
        use_gaussian=manifest.execution.blend == "gaussian",
        use_mirroring=bool(manifest.execution.mirror),
        perform_everything_on_device=where.type == "cuda",
        device=where,
        allow_tqdm=False,
    )
    try:
        predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        raise ModelRefused(
            f"{manifest.name}: weights: {name} belongs to an nnU-Net folder and is not listed"
        ) from error
    _require_supported(manifest, predictor)
    trained = predictor.allowed_mirroring_axes or ()
    predictor.allowed_mirroring_axes = tuple(axis for axis in manifest.execution.mirror if axis in trained) or None
    return _Trained(manifest, predictor)


def _folds(manifest: Manifest) -> tuple[list[int | str], str]:
    """Return the folds among the manifest's files, and what their checkpoints are called."""
    found = [match for weights in manifest.weights if (match := _CHECKPOINT.match(weights.file))]
    if not found or len({match[2] for match in found}) > 1:
        raise ModelRefused(f"{manifest.name}: weights: name fold_N/checkpoint_final.pth, of each fold the same file")
    return [match[1] if match[1] == "all" else int(match[1]) for match in found], found[0][2]


def _require_supported(manifest: Manifest, predictor: Any) -> None:
    if predictor.configuration_manager.previous_stage_name is not None:
        raise ModelRefused(f"{manifest.name}: the last stage of a cascade cannot be run alone")
    channels = len(predictor.dataset_json.get("channel_names") or predictor.dataset_json.get("modality") or ())
    if channels != len(manifest.inputs):
        raise ModelRefused(f"{manifest.name}: inputs: dataset.json has {channels} channels, so many inputs are needed")


class _Trained:
    """A trained nnU-Net, all of its folds."""

    def __init__(self, manifest: Manifest, predictor: Any) -> None:
        self._manifest = manifest
        self._predictor = predictor

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Predict; the channels are the manifest's inputs in their order."""
        settle(self._manifest.seed)
        prepared, spacing = self._prepared(grid)
        data, properties = self._preprocessed(prepared, spacing)
        logits = self._logits(data, progress)
        labels, probabilities = self._converted(logits, properties)
        outputs = self._manifest.outputs
        values = np.where(np.isin(labels, list(outputs.segments)), labels, 0).astype(np.uint8)
        certainty = {} if probabilities is None else _certainty(values, probabilities, outputs.segments)
        maps = {}
        if probabilities is not None:
            maps = {
                name: prepared.values_back(np.asarray(probabilities[one.channel], np.float32))
                for name, one in outputs.maps.items()
            }
        parameters = {"seed": str(self._manifest.seed), "folds": str(len(self._predictor.list_of_parameters))}
        return Prediction(
            labels=prepared.labels_back(values) if outputs.segments else None,
            certainty=certainty,
            maps=maps,
            parameters=parameters,
        )

    def _prepared(self, grid: Grid) -> tuple[Prepared, list[float]]:
        """Return the channels in nnU-Net's axes, and the spacing (mm) of these."""
        slots = list(self._manifest.inputs.items())
        reader = self._predictor.plans_manager.plans.get("image_reader_writer")
        axes = _RAS if reader == _REORIENTING else slots[0][1].axes
        name, first = slots[0]
        slots[0] = name, regular(grid, first.model_copy(update={"axes": axes}))
        prepared = prepare(grid, slots)
        step = grid.spacing if prepared.frame is None else prepared.frame.step
        return prepared, [float(step[axis]) for axis in prepared.order]

    def _preprocessed(self, prepared: Prepared, spacing: Sequence[float]) -> tuple[torch.Tensor, dict[str, Any]]:
        plans, configuration = self._predictor.plans_manager, self._predictor.configuration_manager
        properties: dict[str, Any] = {"spacing": list(spacing)}
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(
            prepared.array, None, properties, plans, configuration, self._predictor.dataset_json
        )
        return torch.from_numpy(np.ascontiguousarray(data)), properties

    def _logits(self, data: torch.Tensor, progress: Progress) -> torch.Tensor:
        """Return the mean of all folds, with progress after each window."""
        predictor = self._predictor
        padded = [max(*pair) for pair in zip(data.shape[1:], _three(predictor), strict=True)]
        windows = len(predictor._internal_get_sliding_window_slicers(tuple(padded)))
        forwards = windows * len(predictor.list_of_parameters) * 2 ** len(predictor.allowed_mirroring_axes or ())
        done = 0

        def count(*_: object) -> None:
            nonlocal done
            done += 1
            progress(min(done / forwards, 1.0))

        hook = predictor.network.register_forward_hook(count)
        try:
            logits: torch.Tensor = predictor.predict_logits_from_preprocessed_data(data).cpu()
        finally:
            hook.remove()
        return logits

    def _converted(
        self, logits: torch.Tensor, properties: dict[str, Any]
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32] | None]:
        """Return label values over nnU-Net's input and, where the manifest has a use for them, probabilities."""
        from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

        predictor, manifest = self._predictor, self._manifest
        wanted = bool(manifest.outputs.maps) or any(guard.confidence for guard in manifest.guards.values())
        answer = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.label_manager,
            properties,
            return_probabilities=wanted,
        )
        labels, probabilities = answer if wanted else (answer, None)
        return np.asarray(labels), None if probabilities is None else np.asarray(probabilities, np.float32)


def _three(predictor: Any) -> list[int]:
    """Return the window's size; a network of two dimensions sees one plane at a time."""
    patch = [int(side) for side in predictor.configuration_manager.patch_size]
    return patch if len(patch) == 3 else [1, *patch]


def _certainty(
    labels: npt.NDArray[np.uint8], probabilities: npt.NDArray[np.float32], values: Sequence[int] | Any
) -> dict[int, float]:
    made = {}
    for value in values:
        mask = labels == value
        if mask.any() and value < len(probabilities):
            made[value] = float(probabilities[value][mask].mean())
    return made


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the code that runs it; nnU-Net's own is named by its version."""
    return digest_of_networks()
