"""Which device a model runs on."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dicom_node.errors import ModelRefused

if TYPE_CHECKING:  # whoever needs no GPU need not have torch imported, which takes seconds
    import torch


def choose_device(setting: str) -> str:
    """Return the device that a setting means, cpu, cuda or cuda:N; raise ModelRefused where it is not there."""
    if setting == "cpu":
        return setting
    if _has_driver():
        import torch

        if torch.cuda.is_available():
            return "cuda" if setting == "auto" else setting
    if setting == "auto":
        return "cpu"
    raise ModelRefused(f"node.device is {setting}, and torch finds no CUDA device")


def _has_driver() -> bool:
    """Return whether a GPU's driver is here, NVIDIA's or AMD's, without which torch need not be asked."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def is_gpu(device: str) -> bool:
    """Return whether a device is a GPU."""
    return device.startswith("cuda")


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; to a GPU from pinned memory, so that the next is cut while this one is copied."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def memory_megabytes(device: str) -> int:
    """Return the memory of a GPU, or of this machine (what its control group leaves of it), in MiB."""
    if is_gpu(device):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory) >> 20
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # there is none, or it says "max"
        group = machine
    return min(machine, group) >> 20
