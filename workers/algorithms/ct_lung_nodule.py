"""Rounded opacities of 4 to 30 mm in the lungs: a multi-scale dot filter and rules of shape. A demonstration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as nn
from scipy import ndimage

from workers.algorithms import ct_lung
from workers.algorithms.dots import dot_enhancement, smoothed
from workers.algorithms.morphology import Mask, pooled
from workers.prediction import Detection, Grid, Prediction, Progress

_VOXEL = 1.5  # mm; edge of the cubes that candidates are found on
_DIAMETERS = (4.0, 6.0, 9.0, 13.5, 20.0, 28.0)  # mm
_RANGE = (4.0, 30.0)  # mm, of what is reported
_BACKGROUND = -850.0  # HU of lung, and of everything that is no lung
_CEILING = 100.0  # HU; calcium and metal count as soft tissue
_RESPONSE = 45.0  # HU; weaker dots are noise
_DENSEST = -450.0  # HU; the middle of a candidate is at least so dense
_MARGIN = 8.0  # mm around the lungs
_MOST_CANDIDATES = 400
_SHELL = 1.4  # times the radius: where a vessel passes and a nodule has ended


@dataclass(frozen=True, slots=True)
class _Cubes:
    """The lungs on cubic voxels: HU with everything else at lung's, the mask, and the way back to the grid."""

    values: torch.Tensor
    inside: torch.Tensor
    depth: npt.NDArray[np.float32]  # mm from the border of the lung
    k_of: npt.NDArray[np.float64]  # place of each plane of cubes on the grid's axis k, in planes
    offset: tuple[int, int]  # of the first cube, in grid voxels, along j and i
    factor: tuple[int, int]  # grid voxels in a cube along j and i
    size: tuple[float, float, float]  # mm


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A region that looks like a ball, by numbers."""

    region: Mask
    corner: tuple[int, int, int]
    diameter: float  # mm, of a ball of the same volume
    elongation: float  # longest over shortest axis
    roundness: float  # share of the ball around it that it fills
    passing: float  # share of the shell around it that is as dense: vessels that pass through
    contrast: float  # HU above the lung
    border: float  # share of it that lies at the lung's border
    response: float


def load(parameters: Mapping[str, object], device: torch.device) -> CtLungNodule:
    """Return the model; `threshold` is the least confidence that is reported."""
    return CtLungNodule(device, float(str(parameters.get("threshold", 0.5))))


@dataclass(frozen=True, slots=True)
class CtLungNodule:
    """Detects nodules."""

    device: torch.device
    threshold: float

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Return what is found, outlined; raise NotApplicable where there are no lungs."""
        lungs = ct_lung.segment(grid, self.device, lambda part: progress(0.5 * part))
        cubes = _cubes(grid, lungs > 0, self.device)
        candidates = _candidates(cubes)
        progress(0.8)
        judged = sorted(((confidence(c), c) for c in candidates), key=lambda pair: -pair[0])
        instances = np.zeros(grid.values.shape, np.uint16)
        detections: list[Detection] = []
        for sure, candidate in judged:
            if sure >= self.threshold:
                found = _outlined(candidate, sure, len(detections) + 1, cubes, grid, lungs, instances)
                detections.extend([found] if found else [])
        progress(1.0)
        return Prediction(
            instances=instances,
            detections=tuple(detections),
            parameters={"threshold": f"{self.threshold:g}", "diameters mm": f"{_RANGE[0]:g} to {_RANGE[1]:g}"},
        )


# -- cubes --------------------------------------------------------------------------------------------------------


def _cubes(grid: Grid, lungs: Mask, device: torch.device) -> _Cubes:
    """Resample the lungs' surroundings to cubes: means in the plane, straight lines between the true positions."""
    planes, rows, columns = (_extent(lungs, axis, grid) for axis in range(3))
    factor = tuple(max(1, round(_VOXEL / size)) for size in grid.spacing[1:])
    factor2 = (factor[0], factor[1])
    clipped = np.clip(grid.values[planes, rows, columns], -1000, _CEILING)
    mask = lungs[planes, rows, columns]
    values = torch.from_numpy(np.where(mask, clipped, _BACKGROUND).astype(np.float32)).to(device)
    values = pooled(values, (1, *factor2))
    share = pooled(torch.from_numpy(mask.astype(np.float32)).to(device), (1, *factor2))
    positions = grid.positions[planes]
    step = grid.spacing[1] * factor2[0]
    wanted = np.arange(positions[0], positions[-1] + 1e-6, step)
    k_of = np.interp(wanted, positions, np.arange(len(positions)))
    inside = _between(share, k_of) > 0.5
    size = (step, step, grid.spacing[2] * factor2[1])
    depth = ndimage.distance_transform_edt(inside.cpu().numpy(), size).astype(np.float32)
    k_on_grid = k_of + planes.start
    return _Cubes(_between(values, k_of), inside, depth, k_on_grid, (rows.start, columns.start), factor2, size)


def _extent(mask: Mask, axis: int, grid: Grid) -> slice:
    others = tuple(other for other in range(3) if other != axis)
    where = np.flatnonzero(mask.any(axis=others))
    margin = math.ceil(_MARGIN / grid.spacing[axis])
    return slice(max(0, int(where[0]) - margin), min(mask.shape[axis], int(where[-1]) + margin + 1))


def _between(values: torch.Tensor, k_of: npt.NDArray[np.float64]) -> torch.Tensor:
    """Return planes at fractional places, each a mean of its two neighbours by distance."""
    lower = np.minimum(k_of.astype(int), max(0, len(values) - 2))
    weight = torch.from_numpy((k_of - lower).astype(np.float32)).to(values.device)[:, None, None]
    upper = np.minimum(lower + 1, len(values) - 1)
    return values[lower] * (1 - weight) + values[upper] * weight


# -- candidates ---------------------------------------------------------------------------------------------------


def _candidates(cubes: _Cubes) -> list[_Candidate]:
    """Return the regions around the strongest dots, each once."""
    voxel = cubes.size[0]
    response = dot_enhancement(cubes.values, cubes.inside, _DIAMETERS, voxel)
    peaks = (response == nn.max_pool3d(response[None, None], 5, stride=1, padding=2)[0, 0]) & (response > _RESPONSE)
    soft = smoothed(cubes.values, 0.7)
    places = peaks.nonzero()
    order = response[peaks].argsort(descending=True)[:_MOST_CANDIDATES]
    values, strengths = soft.cpu().numpy(), response.cpu().numpy()
    taken = np.zeros(values.shape, bool)
    found = []
    for k, j, i in places[order].cpu().tolist():
        if taken[k, j, i] or values[k, j, i] < _DENSEST:
            continue
        candidate = _grown(values, (k, j, i), cubes, float(strengths[k, j, i]))
        if candidate is not None:
            k0, j0, i0 = candidate.corner
            depth, height, width = candidate.region.shape
            taken[k0 : k0 + depth, j0 : j0 + height, i0 : i0 + width] |= candidate.region
            found.append(candidate)
    return found


def _grown(
    values: npt.NDArray[np.float32], peak: tuple[int, int, int], cubes: _Cubes, response: float
) -> _Candidate | None:
    """Grow a region from a peak down to half its contrast, cut from the vessels that leave it; None if no ball."""
    reach = math.ceil(0.8 * _RANGE[1] / cubes.size[0])
    window = tuple(slice(max(0, c - reach), c + reach + 1) for c in peak)
    centre = tuple(c - part.start for c, part in zip(peak, window, strict=True))
    local = values[window]
    level = (float(local[centre]) + _BACKGROUND) / 2
    dense = local > level
    depth = ndimage.distance_transform_edt(np.pad(dense, 1), cubes.size)[1:-1, 1:-1, 1:-1]
    radius = float(depth[tuple(slice(max(0, c - 1), c + 2) for c in centre)].max())
    region = _core(dense, depth, centre, radius)
    volume = float(region.sum()) * math.prod(cubes.size)
    diameter = 2 * (3 * volume / (4 * math.pi)) ** (1 / 3)
    if not 0.75 * _RANGE[0] <= diameter <= 1.1 * _RANGE[1]:
        return None
    return _Candidate(
        region=region,
        corner=(window[0].start, window[1].start, window[2].start),
        diameter=diameter,
        elongation=_elongation(region, cubes.size),
        roundness=_roundness(region, diameter, cubes.size),
        passing=_passing(dense, region, diameter, cubes.size),
        contrast=float(local[region].mean()) - _BACKGROUND,
        border=float((cubes.depth[window][region] < 1.5 * cubes.size[0]).mean()),
        response=response,
    )


def _core(dense: Mask, depth: npt.NDArray[np.float64], centre: tuple[int, ...], radius: float) -> Mask:
    """Return the body that a peak belongs to: what a ball of half its radius can reach inside it."""
    labels, _number = ndimage.label(depth > 0.45 * radius)
    number = labels[centre]
    if number == 0:
        near = labels[tuple(slice(max(0, c - 1), c + 2) for c in centre)]
        number = int(near.max())
    if number == 0:
        labels, _number = ndimage.label(dense)
        return np.asarray(labels == labels[centre]) if labels[centre] else np.asarray(dense & False)
    core = labels == number
    grown = ndimage.binary_dilation(core, iterations=max(1, round(0.45 * radius / _VOXEL)), mask=dense)
    return np.asarray(grown)


def _elongation(region: Mask, size: tuple[float, float, float]) -> float:
    points = np.argwhere(region) * np.array(size)
    if len(points) < 4:
        return 1.0
    spread = np.linalg.eigvalsh(np.cov(points.T) + np.diag(np.square(size)) / 12)
    return float(np.sqrt(spread[-1] / max(spread[0], 1e-6)))


def _roundness(region: Mask, diameter: float, size: tuple[float, float, float]) -> float:
    """Return the share of a region that lies in the ball of the same volume around its middle."""
    points = np.argwhere(region) * np.array(size)
    away = np.linalg.norm(points - points.mean(axis=0), axis=1)
    return float((away <= diameter / 2 + 0.3 * size[0]).mean())


def _passing(dense: Mask, region: Mask, diameter: float, size: tuple[float, float, float]) -> float:
    middle = np.argwhere(region).mean(axis=0)
    axes = [(np.arange(n) - c) * s for n, c, s in zip(dense.shape, middle, size, strict=True)]
    away = np.sqrt(axes[0][:, None, None] ** 2 + axes[1][None, :, None] ** 2 + axes[2][None, None, :] ** 2)
    radius = diameter / 2 * _SHELL + size[0] / 2
    shell = np.abs(away - radius) < size[0] / 2
    return float(dense[shell].mean()) if shell.any() else 1.0


def confidence(candidate: _Candidate) -> float:
    """Return how sure the model is, 0 to 1: a logistic rule over shape, set on inserted nodules (see the card)."""
    if candidate.elongation > 2.6 or candidate.roundness < 0.55 or candidate.contrast < 220:
        return 0.0
    small = max(0.0, 7.0 - candidate.diameter)
    score = (
        2.2
        + 3.0 * (candidate.roundness - 0.85) / 0.1
        - 2.6 * (candidate.elongation - 1.25) / 0.5
        - 2.2 * (candidate.passing - 0.06) / 0.08
        + 0.8 * (candidate.contrast - 550) / 200
        - 0.45 * small
        - 3.0 * max(0.0, candidate.border - 0.5)
    )
    return 1 / (1 + math.exp(-score))


# -- outlines -----------------------------------------------------------------------------------------------------


def _outlined(
    candidate: _Candidate,
    sure: float,
    value: int,
    cubes: _Cubes,
    grid: Grid,
    lungs: npt.NDArray[np.uint8],
    instances: npt.NDArray[np.uint16],
) -> Detection | None:
    """Draw a candidate on the grid's own voxels and measure it there; None where nothing of it is left."""
    region, box = _on_grid(candidate, cubes, grid)
    region &= (instances[box] == 0) & (lungs[box] > 0)
    if not region.any():
        return None
    in_plane = grid.spacing[1] * grid.spacing[2]
    volume = float(region.sum(axis=(1, 2)) @ grid.thickness[box[0]]) * in_plane
    diameter = 2 * (3 * volume / (4 * math.pi)) ** (1 / 3)
    if not _RANGE[0] * 0.9 <= diameter <= _RANGE[1]:
        return None
    instances[box][region] = value
    where = np.argwhere(region) + [part.start for part in box]
    first, last, centre = where.min(axis=0), where.max(axis=0) + 1, where.mean(axis=0)
    sides = np.bincount(lungs[tuple(where.T)], minlength=3)
    return Detection(
        name="nodule",
        box=((int(first[0]), int(last[0])), (int(first[1]), int(last[1])), (int(first[2]), int(last[2]))),
        centre=(float(centre[0]), float(centre[1]), float(centre[2])),
        confidence=round(sure, 3),
        value=value,
        laterality="right" if sides[ct_lung.RIGHT] >= sides[ct_lung.LEFT] else "left",
        measurements={"diameter": diameter, "volume": volume},
    )


def _on_grid(candidate: _Candidate, cubes: _Cubes, grid: Grid) -> tuple[Mask, tuple[slice, slice, slice]]:
    """Return a candidate's region on the grid's voxels, and where its box lies on the grid."""
    k0, j0, i0 = candidate.corner
    depth, height, width = candidate.region.shape
    k_first, k_last = cubes.k_of[k0], cubes.k_of[min(k0 + depth, len(cubes.k_of)) - 1]
    planes = np.arange(math.ceil(k_first - 1e-6), math.floor(k_last + 1e-6) + 1)
    if not len(planes):
        planes = np.array([round((k_first + k_last) / 2)])
    nearest = np.abs(cubes.k_of[k0 : k0 + depth][None, :] - planes[:, None]).argmin(axis=1)
    fj, fi = cubes.factor
    fine = candidate.region[nearest].repeat(fj, axis=1).repeat(fi, axis=2)
    j, i = cubes.offset[0] + j0 * fj, cubes.offset[1] + i0 * fi
    box = (
        slice(int(planes[0]), int(planes[-1]) + 1),
        slice(j, min(j + height * fj, grid.values.shape[1])),
        slice(i, min(i + width * fi, grid.values.shape[2])),
    )
    fine = fine[:, : box[1].stop - j, : box[2].stop - i]
    return np.ascontiguousarray(fine), box
