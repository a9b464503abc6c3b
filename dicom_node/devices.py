"""On which devices an embedded node runs models: one worker for each; found without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def devices(setting: str, workers: int, *, gpus: int) -> tuple[str, ...]:
    """Return the device of each worker: `workers` of them, or with 0 one for each GPU that `setting` takes, else one.

    "auto" and "cuda" take every one of `gpus`; more workers than devices share them in turn.
    """
    every_gpu = setting in ("auto", "cuda") and gpus > 0
    there = [f"cuda:{number}" for number in range(gpus)] if every_gpu else [setting]
    return tuple(there[number % len(there)] for number in range(workers or len(there)))


def count_gpus(environment: Mapping[str, str] = os.environ, drivers: Path = _NVIDIA) -> int:
    """Return how many GPUs of this machine a process may see: those of the driver, or of CUDA_VISIBLE_DEVICES."""
    installed = len(list(drivers.iterdir())) if drivers.is_dir() else 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    return min(installed, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))
