"""ONNX by ONNX Runtime. External data and custom operators are refused: the one file that was approved is all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dicom_node.errors import ModelRefused
from dicom_node.manifest import Manifest
from workers.device import choose_device, is_gpu
from workers.network import NetworkModel
from workers.prediction import Model
from workers.provenance import digest_of_networks


def load(manifest: Manifest, folder: Path, device: str) -> Model:
    """Return the network in the first of the manifest's weights; raise ModelRefused where it cannot be run here."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModelRefused(f"{manifest.name}: runtime onnx needs pip install 'dicom-node[onnx]'") from error
    file = manifest.weights[0].file
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    available = onnxruntime.get_available_providers()
    wanted = (
        ["CUDAExecutionProvider", "CPUExecutionProvider"] if is_gpu(choose_device(device)) else ["CPUExecutionProvider"]
    )
    try:
        # from bytes: relative paths of external data have nothing to be relative to
        session = onnxruntime.InferenceSession(
            (folder / file).read_bytes(), options, providers=[one for one in wanted if one in available]
        )
    except Exception as error:
        # onnxruntime raises classes of its own for each kind of mistake, with the operator's or file's name
        raise ModelRefused(f"{manifest.name}: {file}: {_first(error)}") from error
    return NetworkModel(manifest, _forward(session), torch.device("cpu"))


def _forward(session: Any) -> Any:
    inputs = session.get_inputs()
    names = [output.name for output in session.get_outputs()]

    def forward(batch: torch.Tensor) -> dict[int | str, torch.Tensor]:
        made = session.run(None, {inputs[0].name: batch.numpy()})
        tensors = [torch.from_numpy(one) for one in made]
        return {**dict(enumerate(tensors)), **dict(zip(names, tensors, strict=True))}

    return forward


def _first(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__


def code_digest(manifest: Manifest) -> str:
    """Return the SHA-256 (hex) over the code that runs it."""
    return digest_of_networks()
