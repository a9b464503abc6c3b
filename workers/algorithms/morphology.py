"""Mathematical morphology on voxels; masks are float tensors or boolean arrays of shape (k, j, i)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nn
from scipy import ndimage

Mask = npt.NDArray[np.bool_]


Spacing = tuple[float, float, float]


_FEW = 64  # voxels of a ball, up to which moving a mask to each is faster than measuring distances
_TIE = 1e-4  # more than rounding, less than a step of what trilinear weights add up to


def ball_dilate(mask: Mask, radius: float, spacing: Spacing) -> Mask:
    """Grow a mask by `radius` mm in every direction."""
    grown = np.zeros_like(mask)
    box = around(mask, radius, spacing)
    if box is not None:
        grown[box] = _near(mask[box], radius, spacing)
    return grown


def ball_erode(mask: Mask, radius: float, spacing: Spacing) -> Mask:
    """Shrink a mask by `radius` mm; what lies outside the volume counts as inside."""
    shrunk = np.zeros_like(mask)
    box = around(mask, max(spacing), spacing)
    if box is not None:
        shrunk[box] = ~_near(~mask[box], radius, spacing)
    return shrunk


def _near(mask: Mask, radius: float, spacing: Spacing) -> Mask:
    """Return every voxel that has one of a mask within `radius` mm."""
    ball = _ball(radius, spacing)
    if len(ball) > _FEW:
        return np.asarray(ndimage.distance_transform_edt(~mask, spacing) <= radius if mask.any() else mask)
    near = mask.copy()
    for offset in ball.tolist():
        near[_moved(offset, mask.shape)] |= mask[_moved([-step for step in offset], mask.shape)]
    return near


def _moved(offset: Sequence[int], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return where in a volume lies what `offset` moves, as far as it stays inside."""
    return tuple(slice(max(0, step), max(0, length + min(0, step))) for step, length in zip(offset, shape, strict=True))


def _ball(radius: float, spacing: Spacing) -> npt.NDArray[np.int64]:
    """Return the steps (n, 3), in voxels, to all that lies within `radius` mm of a voxel."""
    reach = [math.ceil(radius / size) for size in spacing]
    steps = np.indices([2 * length + 1 for length in reach]).reshape(3, -1).T - reach
    return np.asarray(steps[np.sqrt(((steps * spacing) ** 2).sum(axis=1)) <= radius])


def ball_close(mask: Mask, radius: float, spacing: Spacing) -> Mask:
    """Fill gaps and notches that a ball of `radius` mm cannot enter."""
    closed = np.zeros_like(mask)
    box = around(mask, 0.0, spacing)
    if box is None:
        return closed
    pad = [(math.ceil(radius / size) + 1,) * 2 for size in spacing]
    grown = ball_dilate(np.pad(mask[box], pad), radius, spacing)
    whole = ~_near(~grown, radius, spacing)
    inner = tuple(slice(before, extent - after) for (before, after), extent in zip(pad, whole.shape, strict=True))
    closed[box] = whole[inner]
    return closed


def around(mask: Mask, margin: float, spacing: Spacing) -> tuple[slice, ...] | None:
    """Return the box around a mask with `margin` mm on every side; None where the mask is empty."""
    box = []
    for axis, size in enumerate(spacing):
        where = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        if where.size == 0:
            return None
        reach = math.ceil(margin / size)
        box.append(slice(max(0, int(where[0]) - reach), min(mask.shape[axis], int(where[-1]) + reach + 1)))
    return tuple(box)


def fill_slices(mask: Mask) -> Mask:
    """Fill the holes of every axial slice."""
    return np.stack([ndimage.binary_fill_holes(plane) for plane in mask])


def pooled(values: torch.Tensor, factor: tuple[int, int, int]) -> torch.Tensor:
    """Return means over blocks of `factor` voxels; the last, incomplete blocks are averages of what is there."""
    return nn.avg_pool3d(values[None, None], factor, stride=factor, ceil_mode=True, count_include_pad=False)[0, 0]


def unpooled(mask: Mask, factor: tuple[int, int, int], shape: tuple[int, ...]) -> Mask:
    """Return a pooled mask at full resolution, its border smooth to half a pooled voxel; halfway is outside."""
    if factor == (1, 1, 1):
        return mask
    whole = np.zeros(shape, bool)
    box = around(mask, 1.0, (1.0, 1.0, 1.0))  # with a border of what is not in it, unless the mask ends with the array
    if box is None:
        return whole
    place = tuple(
        slice(part.start * step, min(part.stop * step, length))
        for part, step, length in zip(box, factor, shape, strict=True)
    )
    padded = np.pad(mask[box], 1, mode="edge").astype(np.float32)
    tensor = torch.from_numpy(padded)[None, None]
    size = tuple(length * step for length, step in zip(padded.shape, factor, strict=True))
    fine = nn.interpolate(tensor, size=size, mode="trilinear", align_corners=False)[0, 0]
    inner = tuple(slice(step, step + part.stop - part.start) for step, part in zip(factor, place, strict=True))
    whole[place] = (fine[inner] > 0.5 + _TIE).numpy()
    return whole


def components(mask: Mask) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the connected components (faces touch), numbered from 1, and how many voxels each has (0: none)."""
    labels, number = ndimage.label(mask)
    return labels, np.bincount(labels.ravel(), minlength=number + 1)


def largest(mask: Mask) -> Mask:
    """Return the largest connected component."""
    labels, sizes = components(mask)
    if len(sizes) < 2:
        return mask
    sizes[0] = 0
    return np.asarray(labels == sizes.argmax())
