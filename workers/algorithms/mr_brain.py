"""The brain in MR T1 of a head, by the two networks of deepbet (Fisch et al. 2023): where it is, then what it is.

The networks are those of the package deepbet (MIT); what stands before and after them is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch.nn import functional

from dicom_node.errors import ModelRefused, NotApplicable
from dicom_node.findings import Reason
from workers.prediction import Grid, Prediction, Progress

BRAIN = 1
_COARSE, _FINE = (128, 128, 128), (256, 256, 256)  # voxels of the first and the second network
_DARKEST, _BRIGHTEST = 0.005, 0.995  # quantiles that become black and white
_MEAN, _DEVIATION = 0.449, 0.226  # of intensities in the networks' training
_MARGIN = 0.1  # of the brain's box, added on each side
_PRESENT = 0.02  # of a plane: less brain is none
_PROBABLE = 0.5

Mask = npt.NDArray[np.bool_]


def load(parameters: Mapping[str, object], device: torch.device, files: Sequence[Path]) -> MrBrain:
    """Return the model from its two files: the network of the brain, then that of its box."""
    jit: Any = torch.jit  # untyped
    try:
        brain, box = (jit.load(str(path), map_location=device).eval() for path in files)
    except (RuntimeError, ValueError) as error:
        raise ModelRefused(f"mr_brain: {type(error).__name__} in the networks of deepbet") from error
    return MrBrain(brain, box, device)


@dataclass(frozen=True, slots=True)
class MrBrain:
    """Segments the brain."""

    brain: Any
    box: Any
    device: torch.device

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Return label 1 (brain); raise NotApplicable where there is none."""
        volume = np.ascontiguousarray(_to_ras(np.nan_to_num(grid.values.astype(np.float32))))
        with torch.inference_mode():
            probability = self._probability(torch.from_numpy(volume).to(self.device), progress)
        mask = _largest(probability > _PROBABLE)
        if not mask.any():
            raise NotApplicable(Reason.ORGAN_NOT_FOUND, "no brain")
        mask = ndimage.binary_fill_holes(mask)
        certainty = float(probability[mask].mean())
        progress(1.0)
        labels = np.ascontiguousarray(_from_ras(mask.astype(np.uint8)))
        return Prediction(labels=labels, certainty={BRAIN: certainty}, parameters={"threshold": f"{_PROBABLE:g}"})

    def _probability(self, volume: torch.Tensor, progress: Progress) -> npt.NDArray[np.float32]:
        """Return the probability of brain for each voxel."""
        coarse = _resized(volume, _COARSE)
        low, high = torch.quantile(coarse, _DARKEST), torch.quantile(coarse, _BRIGHTEST)
        if high <= low:
            raise NotApplicable(Reason.ORGAN_NOT_FOUND, "the images are of one brightness")
        first = self.box(_normalised(coarse, low, high)[None, None])[0, 1]
        progress(0.2)
        box = _box_of(_largest((first > _PROBABLE).cpu().numpy()), tuple(volume.shape))
        second = self.brain(_normalised(_resized(volume[box], _FINE), low, high)[None, None])[0, 1]
        progress(0.9)
        probability = torch.zeros_like(volume)
        probability[box] = _resized(second, tuple(volume[box].shape))
        made: npt.NDArray[np.float32] = probability.cpu().numpy()
        return made


def _resized(volume: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return functional.interpolate(volume[None, None].float(), tuple(shape), mode="nearest-exact")[0, 0]


def _normalised(volume: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    scaled = ((volume - low) / (high - low)).clamp(0, 1)
    return _DEVIATION * (scaled - scaled.mean()) / scaled.std() + _MEAN


def _largest(mask: Mask) -> Mask:
    numbered, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count < 2:
        return mask
    sizes = np.bincount(numbered.ravel())
    sizes[0] = 0
    return np.asarray(numbered == sizes.argmax())


def _box_of(mask: Mask, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the box around a coarse mask in a volume of `shape`, with a margin."""
    box = []
    for axis, size in enumerate(shape):
        others = tuple(other for other in range(3) if other != axis)
        present = np.flatnonzero(mask.mean(axis=others) > _PRESENT)
        if not present.size:
            raise NotApplicable(Reason.ORGAN_NOT_FOUND, "no brain")
        factor = size / mask.shape[axis]
        centre = round((present[-1] + 1 + present[0]) / 2 * factor)
        half = round((1 + 2 * _MARGIN) * (present[-1] + 1 - present[0]) * factor) / 2
        box.append(slice(max(int(centre - half), 0), min(int(centre + half), size)))
    return tuple(box)


# -- axes: the grid runs to the head, the back and the left; the networks were trained to the right, front and head ----


def _to_ras(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.transpose(values[:, ::-1, ::-1], (2, 1, 0))


def _from_ras(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.transpose(values, (2, 1, 0))[:, ::-1, ::-1]
