"""One series on the grid of another, by true position, in every pair of geometries."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.errors import NotApplicable
from tests.conformance.cases import GEOMETRIES
from workers.alignment import aligned, require_one_frame
from workers.volume import load

FINE = {"slices": 40, "size": (80, 90), "spacing": (8.0, 4.1, 3.9), "noise": 0.0}
COARSE = {"slices": 17, "size": (40, 52), "spacing": (18.0, 8.3, 7.1), "noise": 0.0}
SLOPE = np.array([0.7, -1.3, 2.1])


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids")

    def make(name, size):
        phantom = make_thorax(**{**size, **GEOMETRIES[name]}, seed=2)
        return load(write_series(phantom, folder / f"{name}{size['slices']}")).grid

    return {
        (name, which): make(name, size) for name in GEOMETRIES for which, size in (("fine", FINE), ("coarse", COARSE))
    }


def linear(grid):
    """A field that grows evenly in patient space, at the voxels of a grid."""
    k, j, i = np.indices(grid.shape)
    numbers = [k, j, i]
    points = grid.origins[numbers[grid.stack]]
    for axis in range(3):
        if axis != grid.stack:
            points = points + (numbers[axis] * grid.spacing[axis])[..., None] * grid.directions[axis]
    return points @ SLOPE


@pytest.mark.parametrize("onto", sorted(GEOMETRIES))
@pytest.mark.parametrize("other", ["axial", "sagittal", "oblique", "tilted", "uneven"])
def test_a_field_in_patient_space_comes_out_at_its_places(grids, onto, other):
    fine, coarse = grids[other, "fine"], grids[onto, "coarse"]
    truth = linear(coarse)

    made = aligned(replace(fine, values=linear(fine).astype(np.float32)), coarse)

    lowest = linear(fine).min()
    inside = made > lowest + 1
    assert inside.mean() > 0.3, "the two lie over one another"
    errors = np.abs(made - truth)[inside]
    assert np.quantile(errors, 0.9) < 0.15  # positions are rounded to a tenth of a millimetre
    assert np.quantile(np.abs(made[:, :, ::-1] - truth)[inside], 0.5) > 5.0, "a mirrored one would be noticed"


def test_what_lies_outside_is_the_lowest_value(grids):
    grid = grids["axial", "coarse"]
    far = replace(grid, origins=grid.origins + np.array([0, 0, 1000.0]), positions=grid.positions + 1000.0)
    values = np.full(grid.shape, 7.0, np.float32)
    values[0, 0, 0] = -3.0

    assert (aligned(replace(far, values=values), grid) == -3.0).all()


@pytest.mark.parametrize(("first", "other"), [("1.2.3", "1.2.4"), ("", ""), ("1.2.3", "")])
def test_series_of_different_frames_are_not_put_together(first, other):
    with pytest.raises(NotApplicable, match="frame"):
        require_one_frame(first, other)
    require_one_frame("1.2.3", "1.2.3")
