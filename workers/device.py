"""Which device a model runs on."""

from __future__ import annotations

import os
from pathlib import Path

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


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; to a GPU from pinned memory, so that the next is cut while this one is copied."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def memory_megabytes(device: torch.device) -> int:
    """Return the memory of a GPU, or of this machine (what its control group leaves of it), in MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) >> 20
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # there is none, or it says "max"
        group = machine
    return min(machine, group) >> 20
