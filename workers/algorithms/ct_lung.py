"""The right and the left lung in chest CT, by thresholds and morphology (after Hu, Hoffman and Reinhardt 2001)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from dicom_node.errors import NotApplicable
from dicom_node.findings import Reason
from workers.algorithms.airway import find_airway
from workers.algorithms.morphology import (
    Mask,
    around,
    ball_close,
    ball_dilate,
    ball_erode,
    components,
    fill_slices,
    largest,
    pooled,
    unpooled,
)
from workers.prediction import Grid, Prediction, Progress

RIGHT, LEFT = 1, 2

_WORKING = 2.0  # mm; voxels of the coarse grid on which all but the border is decided
_TISSUE = -400.0  # HU between lung and everything else
_BONE_AND_MUSCLE = -250.0
_TABLE = 3.0  # mm; what is thinner than twice this and touches the body is not of the body; a thin chest wall is 10 mm
_MEAN = (-960.0, -350.0)  # HU that a lung can have on average; gas in the bowel has less
_SMALLEST = 60_000.0  # mm3 of a lung, or of a part of one that disease has cut off
_SHARE = 0.05  # of the largest region, that another must have; less is gas in stomach or bowel
_LUNGS = (700_000.0, 12_000_000.0)  # mm3 of both together
_BOTH_SIDES = 0.08  # share of a region beyond the midline from which it may be two lungs grown together
_SURELY_BOTH = 0.2  # the same, counted from _AWAY: no lung alone reaches so far across
_AWAY = 30.0  # mm from the midline
_NOTCH = 8.0  # mm; vessels and nodules at the border that closing takes in
_MASS = 30.0  # mm; the same for masses at the chest wall
_SKIN = 2.0  # mm, taken off what a wide closing adds, so that what is thin falls away
_THICK = 5.0  # mm from the surface to the middle of a mass, at the least
_SMALLEST_MASS = 2000.0  # mm3
_SOFT = -60.0  # HU that a mass has on average; recesses are blurred with air and fat
_FROM_HILUM = 35.0  # mm; nearer to the bronchi, soft tissue is hilum
_HEIGHT = 120.0  # mm of lung from base to apex, at the least


@dataclass(frozen=True, slots=True)
class _Coarse:
    """The grid on which decisions are made: HU, spacing in mm, and what each plane stands for."""

    values: npt.NDArray[np.float32]
    factor: tuple[int, int, int]
    spacing: tuple[float, float, float]
    thickness: npt.NDArray[np.float64]

    @property
    def voxel(self) -> npt.NDArray[np.float64]:
        """Return the volume of a voxel of each plane, mm3."""
        return self.thickness * self.spacing[1] * self.spacing[2]

    def size(self, mask: Mask) -> float:
        """Return the volume of a mask, mm3."""
        return float(mask.sum(axis=(1, 2)) @ self.voxel)


def load(parameters: Mapping[str, object], device: torch.device) -> CtLung:
    """Return the model; it has no parameters."""
    return CtLung(device)


@dataclass(frozen=True, slots=True)
class CtLung:
    """Segments the lungs."""

    device: torch.device

    def __call__(self, grid: Grid, progress: Progress) -> Prediction:
        """Return labels 1 (right) and 2 (left); raise NotApplicable where there are no lungs."""
        labels = segment(grid, self.device, progress)
        return Prediction(labels=labels, parameters={"threshold HU": f"{_TISSUE:g}"})


def segment(grid: Grid, device: torch.device, progress: Progress) -> npt.NDArray[np.uint8]:
    """Return the lungs of `grid`: 1 right, 2 left, uint8 of the grid's shape.

    The last answer is remembered: models of the lungs run on a series one after the other, and each begins here.
    """
    key = _fingerprint(grid)
    if _LAST.key != key:
        _LAST.labels = _segmented(grid, device, progress)
        _LAST.key = key
    progress(1.0)
    return _LAST.labels.copy()


@dataclass(slots=True)
class _Last:
    """The last grid that was segmented in this process, by fingerprint, and its lungs."""

    key: bytes
    labels: npt.NDArray[np.uint8]


_LAST = _Last(b"", np.empty(0, np.uint8))


def _fingerprint(grid: Grid) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(grid.values).data, digest_size=16)
    digest.update(f"{grid.spacing} {grid.stack}".encode() + grid.positions.tobytes() + grid.thickness.tobytes())
    return digest.digest()


def _segmented(grid: Grid, device: torch.device, progress: Progress) -> npt.NDArray[np.uint8]:
    if grid.stack != 0:
        raise NotApplicable(Reason.WRONG_ORIENTATION, "the slices are not axial")
    coarse = _coarse(grid, device)
    body = _body(coarse)
    progress(0.2)
    airway = find_airway(coarse.values, body, coarse.thickness, coarse.spacing)
    progress(0.4)
    lungs = _lungs(coarse, body, airway)
    right, left = _sides(lungs, body, airway, coarse)
    progress(0.6)
    right, left = _closed(right, left, body, airway, coarse)
    _require_lungs(right | left, coarse)
    progress(0.8)
    labels = _refined(right, left, airway, grid, coarse, device)
    return labels


def _coarse(grid: Grid, device: torch.device) -> _Coarse:
    factor = tuple(max(1, round(_WORKING / size)) for size in grid.spacing)
    factor = (factor[0], factor[1], factor[2])
    values = torch.from_numpy(grid.values).to(device, torch.float32).clamp_(-1024.0, 600.0)
    small = pooled(values, factor).cpu().numpy()
    edges = np.arange(0, len(grid.thickness), factor[0])
    spacing = (grid.spacing[0] * factor[0], grid.spacing[1] * factor[1], grid.spacing[2] * factor[2])
    return _Coarse(small, factor, spacing, np.add.reduceat(grid.thickness, edges))


def _body(coarse: _Coarse) -> Mask:
    """Return the patient without table and clothes, its inside filled slice by slice."""
    tissue = coarse.values > _BONE_AND_MUSCLE
    core = largest(ball_erode(tissue, _TABLE, coarse.spacing))
    body = ball_dilate(core, _TABLE, coarse.spacing) & tissue
    return _filled_to_the_edge(body)


def _filled_to_the_edge(body: Mask) -> Mask:
    """Fill every slice; a body that the field of view cuts counts as closed at the sides."""
    filled = fill_slices(body)
    for plane, original in zip(filled, body, strict=True):
        walls = np.pad(original, 1)
        for edge in (0, -1):
            for view in (walls, walls.T):
                touched = np.flatnonzero(view[1 if edge == 0 else -2])
                if len(touched) > 1:
                    view[edge, touched[0] : touched[-1] + 1] = True
        plane |= ndimage.binary_fill_holes(walls)[1:-1, 1:-1]
    return filled


def _lungs(coarse: _Coarse, body: Mask, airway: Mask) -> Mask:
    """Return the large regions of air in the body that are no airway and no gas in the gut."""
    air = (coarse.values < _TISSUE) & body & ~airway
    labels, sizes = components(ball_erode(air, 1.0, coarse.spacing))
    numbers = np.arange(1, len(sizes))
    if numbers.size == 0:
        raise NotApplicable(Reason.ORGAN_NOT_FOUND, "there is no air in the body")
    means = ndimage.mean(coarse.values, labels, numbers)
    heights = [
        int((labels[box] == n).any(axis=(1, 2)).sum()) for n, box in enumerate(ndimage.find_objects(labels), start=1)
    ]
    kept = [
        number
        for number, mean, height in zip(numbers, means, heights, strict=True)
        if _MEAN[0] < mean < _MEAN[1] and height >= 2
    ]
    volumes = {number: coarse.size(labels == number) for number in kept if sizes[number] > 200}
    least = max(_SMALLEST / 2, _SHARE * max(volumes.values(), default=0.0))
    seeds = np.isin(labels, [number for number, volume in volumes.items() if volume > least])
    if not seeds.any():
        raise NotApplicable(Reason.ORGAN_NOT_FOUND, "no region of air looks like a lung")
    return np.asarray(ball_dilate(seeds, 2.5, coarse.spacing) & air)


def _midline(body: Mask, airway: Mask) -> float:
    """Return the column between right and left: where the trachea is, else the middle of the body."""
    columns = np.asarray((airway if airway.any() else body).sum(axis=(0, 1)))
    return float(np.average(np.arange(len(columns)), weights=columns))


def _sides(lungs: Mask, body: Mask, airway: Mask, coarse: _Coarse) -> tuple[Mask, Mask]:
    """Tell right from left, cutting apart what touches at the junction lines."""
    middle = _midline(body, airway)
    right, left = np.zeros_like(lungs), np.zeros_like(lungs)
    labels, sizes = components(lungs)
    for number in range(1, len(sizes)):
        region = labels == number
        parts = _cut(region, middle, coarse) if _crosses(region, middle) else [region]
        for part in parts:
            side = right if _centre(part) < middle else left
            side |= part
    return right, left


def _crosses(region: Mask, middle: float) -> bool:
    columns = region.sum(axis=(0, 1))
    beyond = columns[int(middle) :].sum() / columns.sum()
    return bool(_BOTH_SIDES < beyond < 1 - _BOTH_SIDES)


def _centre(region: Mask) -> float:
    columns = region.sum(axis=(0, 1))
    return float(np.average(np.arange(len(columns)), weights=columns))


def _cut(region: Mask, middle: float, coarse: _Coarse) -> list[Mask]:
    """Cut a region in two at its thinnest, or along the brightest sheet where it is thin nowhere."""
    seeds = _eroded_apart(region, middle, coarse)
    if seeds is not None:
        box = around(region, 0.0, coarse.spacing)
        nearest = ndimage.distance_transform_edt(
            seeds[box] == 0, coarse.spacing, return_distances=False, return_indices=True
        )
        owner = np.zeros_like(seeds)
        owner[box] = seeds[box][tuple(nearest)]
        return [region & (owner == 1), region & (owner == 2)]
    return _cut_at_the_wall(region, middle, coarse)


def _eroded_apart(region: Mask, middle: float, coarse: _Coarse) -> npt.NDArray[np.int16] | None:
    """Erode until a region falls into two parts (1, 2) on either side of the midline; None if it never does."""
    depth = np.zeros(region.shape)
    box = around(region, max(coarse.spacing), coarse.spacing)
    depth[box] = ndimage.distance_transform_edt(region[box], coarse.spacing)
    whole = coarse.size(region)
    for radius in np.arange(1.0, 9.0, 1.0):
        labels, sizes = components(depth > radius)
        order = np.argsort(sizes[1:])[::-1][:2] + 1
        if len(order) < 2:
            continue
        parts = [labels == number for number in order]
        centres = sorted(_centre(part) for part in parts)
        if coarse.size(parts[1]) > 0.05 * whole and centres[0] < middle < centres[1]:
            return np.asarray(parts[0] + 2 * parts[1], np.int16)
    return None


def _cut_at_the_wall(region: Mask, middle: float, coarse: _Coarse) -> list[Mask]:
    """Flood a region from both sides until the floods meet at the junction lines, the brightest sheet between them.

    A lung that is alone may bulge across the midline; it stays whole.
    """
    columns = (np.arange(region.shape[2]) - middle) * coarse.spacing[2]
    sides = np.where(columns < -_AWAY, 1, np.where(columns > _AWAY, 2, 0)).astype(np.int16)
    seeds = np.where(region, sides, np.int16(0))
    whole = int(region.sum())
    if min(int((seeds == 1).sum()), int((seeds == 2).sum())) < _SURELY_BOTH * whole:
        return [region]
    band = slice(int(np.searchsorted(columns, -_AWAY)) - 1, int(np.searchsorted(columns, _AWAY)) + 1)
    inner = region[:, :, band]
    floods = np.where(inner, seeds[:, :, band], np.int16(3))
    heights = np.where(inner, np.clip(coarse.values[:, :, band] + 1024.0, 0, 1000), 1001).astype(np.uint16)
    owner = seeds.copy()
    owner[:, :, band] = ndimage.watershed_ift(heights, floods)
    return [region & (owner == 1), region & (owner == 2)]


def _closed(right: Mask, left: Mask, body: Mask, airway: Mask, coarse: _Coarse) -> tuple[Mask, Mask]:
    """Take in vessels, nodules and masses: notches a ball cannot enter, and holes; never the other lung."""
    allowed = ball_erode(body, 3.0, coarse.spacing) & ~airway
    from_hilum = _from_hilum(airway, right | left, _midline(body, airway), coarse)
    closed = []
    for lung, other in ((right, left), (left, right)):
        if not lung.any():
            closed.append(lung)
            continue
        inside = allowed & ~other
        small = fill_slices(ball_close(lung, _NOTCH, coarse.spacing)) & inside
        closed.append(small | _masses(small, inside, from_hilum, coarse))
    both = closed[0] & closed[1]
    return closed[0] & ~both, closed[1] & ~both


def _masses(closed: Mask, inside: Mask, from_hilum: npt.NDArray[np.float64], coarse: _Coarse) -> Mask:
    """Return the masses that a much wider ball takes in: thick soft tissue, notched into the lung, far from the hilum.

    A ball this wide also bridges the hollow of the hilum and the thin recesses along heart and diaphragm. The
    first lies at the bronchi; the others are thin, or blurred with lung.
    """
    wide = ball_close(closed, _MASS, coarse.spacing) & inside & ~closed
    labels, sizes = components(ball_erode(wide, _SKIN, coarse.spacing))
    taken = np.zeros_like(wide)
    boxes = ndimage.find_objects(labels)
    for number in np.flatnonzero(sizes[1:] > 20) + 1:
        box = boxes[number - 1]
        region = labels[box] == number
        depth = float(ndimage.distance_transform_edt(np.pad(region, 1), coarse.spacing).max())
        size = float(region.sum(axis=(1, 2)) @ coarse.voxel[box[0]])
        thick = depth >= _THICK and size >= _SMALLEST_MASS
        if thick and coarse.values[box][region].mean() > _SOFT and from_hilum[box][region].mean() > _FROM_HILUM:
            taken |= ball_dilate(labels == number, _SKIN + 0.5, coarse.spacing)
    return np.asarray(taken & wide & (from_hilum > 0.7 * _FROM_HILUM))


def _from_hilum(airway: Mask, lungs: Mask, middle: float, coarse: _Coarse) -> npt.NDArray[np.float64]:
    """Return how far (mm) every voxel around the lungs is from the airway; from the midline where none was found."""
    if airway.any():
        distances = np.zeros(airway.shape)
        box = around(airway | lungs, 0.0, coarse.spacing)
        distances[box] = ndimage.distance_transform_edt(~airway[box], coarse.spacing)
        return distances
    columns = np.abs(np.arange(airway.shape[2]) - middle) * coarse.spacing[2]
    return np.broadcast_to(columns, airway.shape)


def _require_lungs(lungs: Mask, coarse: _Coarse) -> None:
    size = coarse.size(lungs)
    if not _LUNGS[0] <= size <= _LUNGS[1]:
        raise NotApplicable(Reason.VOLUME_OUT_OF_RANGE, f"{size / 1000:.0f} mL of lung")
    height = float(coarse.thickness[lungs.any(axis=(1, 2))].sum())
    if height < _HEIGHT:
        raise NotApplicable(Reason.VOLUME_OUT_OF_RANGE, f"only {height:.0f} mm of lung from base to apex")


def _refined(
    right: Mask, left: Mask, airway: Mask, grid: Grid, coarse: _Coarse, device: torch.device
) -> npt.NDArray[np.uint8]:
    """Bring the lungs to full resolution: the inside as decided, the border where the tissue begins."""
    shape = grid.values.shape
    labels = np.zeros(shape, np.uint8)
    aerated = grid.values < _TISSUE
    wall = unpooled(airway, coarse.factor, shape)
    for value, lung in ((RIGHT, right), (LEFT, left)):
        if not lung.any():
            continue
        reach = unpooled(ball_dilate(lung, 1.2 * _WORKING, coarse.spacing), coarse.factor, shape)
        core = unpooled(lung, coarse.factor, shape)
        # tissue inside the closed outline is vessel, nodule or mass; air just outside is lung that blocks blurred
        labels[((reach & aerated & ~wall) | core) & (labels == 0)] = value
    return labels
