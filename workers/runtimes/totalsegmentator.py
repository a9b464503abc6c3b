"""TotalSegmentator, by its Python API: `parameters` are `task` (default `total`), `fast` and `fastest`.

Its weights are nnU-Net folders, named under `weights` as they lie in its own folder of weights:
`Dataset297_.../nnUNetTrainer_...__nnUNetPlans__3d_fullres/plans.json` and so on. It fetches nothing and tells nobody
that it was run. Label values are those of the task's class map. It works in the one process that it is contained in.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dicom_node.errors import ModelRefused, NotApplicable
from dicom_node.findings import Reason
from dicom_node.manifest import Manifest
from workers.affine import ras_affine, regular
from workers.device import choose_device
from workers.network import settle
from workers.prediction import Grid, Model, Prediction, Progress
from workers.preparing import prepare
from workers.provenance import digest_of_networks

_CANONICAL = "SPL"
_SAME = 1e-3  # mm


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the task that the manifest names; raise ModelRefused where TotalSegmentator is not installed."""
    home = Path(tempfile.mkdtemp())
    told = {"totalseg_id": "none", "send_usage_stats": False, "prediction_counter": 0}
    (home / "config.json").write_text(json.dumps(told | {"statistics_disclaimer_shown": True}), encoding="utf-8")
    os.environ |= {"TOTALSEG_HOME_DIR": str(home), "TOTALSEG_WEIGHTS_PATH": str(folder)}
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": str(os.cpu_count() or 1)}
    try:
        from totalsegmentator.python_api import totalsegmentator
    except ModuleNotFoundError as error:
        raise ModelRefused(
            f"{manifest.name}: runtime totalsegmentator needs pip install 'dicom-node[totalsegmentator]'"
        ) from error
    _stay_in_one_process()
    return _Task(manifest, totalsegmentator, choose_device(device))


def _stay_in_one_process() -> None:
    """Have nnU-Net read, predict and write one after the other: a contained process cannot start others."""
    import nnunetv2.inference.predict_from_raw_data as predicting
    import totalsegmentator.nnunet  # noqa: F401 - it changes nnU-Net's class when it is imported

    def predict_from_files(
        self: Any,
        inputs: Any,
        outputs: Any,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
        **_processes: Any,
    ) -> Any:
        return self.predict_from_files_sequential(
            inputs, outputs, save_probabilities, overwrite, folder_with_segs_from_prev_stage
        )

    def cases(folder: str, ending: str, *_: Any, **__: Any) -> list[list[str]]:
        return [[str(path)] for path in sorted(Path(folder).glob(f"*_0000{ending}"))]

    predicting.nnUNetPredictor.predict_from_files = predict_from_files
    predicting.create_lists_from_splitted_dataset_folder = cases


class _Task:
    """One task of TotalSegmentator."""

    def __init__(self, manifest: Manifest, run: Any, device: str) -> None:
        self._manifest = manifest
        self._run = run
        self._device = device.replace("cuda", "gpu", 1)  # its word for it

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Predict."""
        import nibabel

        library: Any = nibabel  # untyped
        if not grid.placed:
            raise NotApplicable(Reason.GEOMETRY_UNUSABLE, "frames without a place in the patient")
        settle(self._manifest.seed)
        name, slot = next(iter(self._manifest.inputs.items()))
        prepared = prepare(grid, [(name, regular(grid, slot.model_copy(update={"axes": _CANONICAL})))])
        affine = ras_affine(prepared)
        parameters = self._manifest.parameters
        answer = self._run(
            library.Nifti1Image(np.ascontiguousarray(prepared.array[0].T), affine),
            None,
            ml=True,
            task=str(parameters.get("task", "total")),
            fast=bool(parameters.get("fast", False)),
            fastest=bool(parameters.get("fastest", False)),
            device=self._device,
            nr_thr_saving=1,
            quiet=True,
        )
        labels = np.asarray(answer.dataobj)
        if labels.shape != prepared.array.shape[:0:-1] or not np.allclose(answer.affine, affine, atol=_SAME):
            raise ModelRefused(f"{self._manifest.name}: TotalSegmentator's answer does not lie on the images")
        progress(1.0)
        known = np.where(np.isin(labels, list(self._manifest.outputs.segments)), labels, 0).astype(np.uint8)
        return Prediction(
            labels=prepared.labels_back(np.ascontiguousarray(known.T)), parameters={"seed": str(self._manifest.seed)}
        )


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the code that runs it."""
    return digest_of_networks()
