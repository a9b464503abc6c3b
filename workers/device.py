"""Which device a model runs on."""

from __future__ import annotations

import torch

from dicom_node.errors import ModelRefused


def choose_device(setting: str) -> torch.device:
    """Return the device of a setting: auto, cpu, cuda or cuda:N; raise ModelRefused where it is not there."""
    available = torch.cuda.is_available()
    if setting == "auto":
        return torch.device("cuda" if available else "cpu")
    if setting.startswith("cuda") and not available:
        raise ModelRefused(f"node.device is {setting}, and torch finds no CUDA device")
    return torch.device(setting)
