"""Dot enhancement: how much every voxel looks like the middle of a bright ball (Li, Sone and Doi 2003)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nn

_REACH = 3.0  # standard deviations that a kernel extends


def dot_enhancement(
    values: torch.Tensor, inside: torch.Tensor, diameters: tuple[float, ...], voxel: float
) -> torch.Tensor:
    """Return the response of the dot filter, the best over balls of `diameters` (mm), 0 outside `inside`.

    `values` has shape (k, j, i) with cubic voxels of `voxel` mm. At each scale sigma = diameter / 4 the response
    is lambda3**2 / |lambda1| of the Hessian's eigenvalues, where all are negative, in the units of `values`.
    """
    best = torch.zeros_like(values)
    where = inside.nonzero(as_tuple=True)
    for diameter in diameters:
        sigma = diameter / 4.0 / voxel
        hessian = [component[where] * sigma**2 for component in _hessian(values, sigma)]
        small, _middle, large = _eigenvalues(*hessian)
        # small is the most negative, large the least: a ball has three alike, a vessel one near zero
        response = torch.where(large < 0, large**2 / small.abs().clamp_min(1e-6), 0.0)
        best[where] = torch.maximum(best[where], response)
    return best


def smoothed(values: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return `values` (k, j, i) under a Gaussian of `sigma` voxels."""
    for axis in range(3):
        values = _along(values, axis, sigma, 0)
    return values


def _hessian(values: torch.Tensor, sigma: float) -> list[torch.Tensor]:
    """Return the six second derivatives kk, jj, ii, kj, ki, ji."""
    none, first, second = (_along(values, 0, sigma, order) for order in range(3))
    neither = _along(none, 1, sigma, 0)
    return [
        _along(_along(second, 1, sigma, 0), 2, sigma, 0),
        _along(_along(none, 1, sigma, 2), 2, sigma, 0),
        _along(neither, 2, sigma, 2),
        _along(_along(first, 1, sigma, 1), 2, sigma, 0),
        _along(_along(first, 1, sigma, 0), 2, sigma, 1),
        _along(_along(none, 1, sigma, 1), 2, sigma, 1),
    ]


def _along(values: torch.Tensor, axis: int, sigma: float, order: int) -> torch.Tensor:
    """Return the derivative of `order` along one axis, under a Gaussian.

    A sum of shifted copies: torch's convolution of one channel takes two to five times as long.
    """
    kernel = _kernel(sigma, order)
    pad = [0] * 6
    pad[4 - 2 * axis] = pad[5 - 2 * axis] = len(kernel) // 2
    padded = nn.pad(values[None, None], pad, mode="replicate")[0, 0]
    length = values.shape[axis]
    total = padded.narrow(axis, 0, length) * kernel[0]
    for shift, weight in enumerate(kernel[1:], start=1):
        total.add_(padded.narrow(axis, shift, length), alpha=weight)
    return total


def _kernel(sigma: float, order: int) -> list[float]:
    half = max(1, math.ceil(_REACH * sigma))
    x = torch.arange(-half, half + 1, dtype=torch.float32)
    gauss = torch.exp(-(x**2) / (2 * sigma**2))
    gauss = gauss / gauss.sum()
    if order == 0:
        weights = gauss
    elif order == 1:
        weights = -x / sigma**2 * gauss
    else:
        weights = (x**2 / sigma**4 - 1 / sigma**2) * gauss
        weights = weights - weights.mean()  # no response to a constant, however short the kernel
    return [float(weight) for weight in weights]


def _eigenvalues(
    kk: torch.Tensor, jj: torch.Tensor, ii: torch.Tensor, kj: torch.Tensor, ki: torch.Tensor, ji: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the eigenvalues of symmetric 3x3 matrices in rising order, in closed form (Smith 1961)."""
    mean = (kk + jj + ii) / 3
    a, b, c = kk - mean, jj - mean, ii - mean
    p = ((a**2 + b**2 + c**2 + 2 * (kj**2 + ki**2 + ji**2)) / 6).clamp_min(1e-12).sqrt()
    determinant = a * (b * c - ji**2) - kj * (kj * c - ji * ki) + ki * (kj * ji - b * ki)
    angle = torch.acos((determinant / (2 * p**3)).clamp(-1, 1)) / 3
    largest = mean + 2 * p * torch.cos(angle)
    smallest = mean + 2 * p * torch.cos(angle + 2 * math.pi / 3)
    return smallest, 3 * mean - largest - smallest, largest
