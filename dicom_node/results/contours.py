"""Outlines of masks, for whatever draws lines instead of pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Contour = npt.NDArray[np.float32]
"""Shape `(points, 2)`: column, row in DICOM image coordinates; closed, the last point is the first."""

# directions an edge can run in, with the region on its right hand: to the right, down, to the left, up
_STEPS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def contours(mask: npt.NDArray[np.bool_]) -> list[Contour]:
    """Return the closed outlines of a mask `(rows, columns)`, holes as outlines of their own, the longest first.

    The points are the middles of the pixels' edges between inside and outside (marching squares at one half),
    so the centre of every pixel is on its own side. The origin is the top-left corner of the top-left pixel
    (PS3.3 C.10.5.1.2). Pixels that touch at a corner only are outlined apart.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    inside = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    edges = _edges(np.pad(inside.astype(bool), 1), top, left)
    found = []
    while edges:
        corner, direction = next(iter(edges))
        found.append(_middles(_followed(edges, corner, direction)))
    return sorted(found, key=len, reverse=True)


def _edges(padded: npt.NDArray[np.bool_], top: int, left: int) -> dict[tuple[tuple[int, int], int], None]:
    """Return every edge of the mask as (the corner it starts at, its direction), in the order of rows.

    `top` and `left` are where the mask, without its padding, lies in the image.
    """
    inside = padded[1:-1, 1:-1]
    beyond = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])  # above, right, below, left
    starts = ((0, 0), (0, 1), (1, 1), (1, 0))  # the corner of the pixel where its edge to that side starts
    edges: dict[tuple[tuple[int, int], int], None] = {}
    for direction, (other, (down, right)) in enumerate(zip(beyond, starts, strict=True)):
        rows, columns = np.nonzero(inside & ~other)
        for row, column in zip((rows + down + top).tolist(), (columns + right + left).tolist(), strict=True):
            edges[(row, column), direction] = None
    return edges


def _followed(
    edges: dict[tuple[tuple[int, int], int], None], corner: tuple[int, int], direction: int
) -> list[tuple[int, int, int]]:
    """Take one closed outline out of `edges`; where two go on, take the one that keeps to the same pixel."""
    path = []
    while ((corner, direction)) in edges:
        del edges[corner, direction]
        path.append((*corner, direction))
        down, right = _STEPS[direction]
        corner = (corner[0] + down, corner[1] + right)
        for turn in (1, 0, 3):
            if (corner, (direction + turn) % 4) in edges:
                direction = (direction + turn) % 4
                break
    return path


def _middles(path: list[tuple[int, int, int]]) -> Contour:
    """Return the middles of edges as a closed line without the points that lie on a straight run."""
    steps = np.array(_STEPS, np.float32) / 2
    points = np.array([(row, column) for row, column, _ in path], np.float32)
    points += steps[[direction for _, _, direction in path]]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    bends = np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-6
    kept = points[bends] if bends.sum() >= 3 else points
    return np.ascontiguousarray(np.concatenate([kept, kept[:1]])[:, ::-1])
