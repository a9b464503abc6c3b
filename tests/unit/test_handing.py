"""What a contained model is given was written before, where it could not read it, and is gone with the grid."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from workers import handing
from workers.handing import Handing
from workers.passing import read_grid
from workers.prediction import Grid


def made_grid(value, *, others=()):
    values = np.full((4, 5, 6), value, np.int16)
    values[0, 1, 2] = value + 1
    return Grid(
        values=values,
        spacing=(3.0, 2.0, 1.0),
        stack=0,
        positions=np.arange(4.0) * 3.0,
        thickness=np.full(4, 3.0),
        directions=np.eye(3),
        origins=np.zeros((4, 3)),
        modality="CT",
        others={name: np.full((4, 5, 6), value + 0.5, np.float32) for name in others},
    )


@pytest.fixture
def handed(tmp_path):
    return Handing(tmp_path / "given", tmp_path / "aside")


@pytest.fixture
def writings(monkeypatch):
    """The grids that are written, as they are."""
    made = []
    write = handing.write_grid
    monkeypatch.setattr(
        handing, "write_grid", lambda grid, folder: made.append(grid.values[0, 0, 0]) or write(grid, folder)
    )
    return made


def files_of(folder):
    return sorted(path.name for path in folder.rglob("*.npy"))


def given(handed, grid, tmp_path, *within):
    arrived = read_grid(handed.give(grid, *within), tmp_path.joinpath("given", *within))
    assert np.array_equal(arrived.values, grid.values)
    assert arrived.values.dtype == grid.values.dtype
    assert all(np.array_equal(arrived.others[name], grid.others[name]) for name in grid.others)
    assert (arrived.spacing, arrived.modality, set(arrived.others)) == (grid.spacing, "CT", set(grid.others))
    return arrived


def test_what_was_prepared_lies_aside_and_is_not_written_again(handed, writings, tmp_path):
    grid = made_grid(7, others=("second",))
    handed.prepare(grid)
    handed.prepare(grid)
    assert files_of(tmp_path / "given") == []

    given(handed, grid, tmp_path)

    assert writings == [7]
    assert files_of(tmp_path / "aside") == []


def test_what_was_not_prepared_is_written_when_it_is_given(handed, writings, tmp_path):
    handed.prepare(made_grid(1))
    grid = made_grid(2)

    given(handed, grid, tmp_path)
    given(handed, grid, tmp_path)

    assert writings == [1, 2, 2]


def test_of_several_that_are_prepared_each_is_given_as_itself(handed, writings, tmp_path):
    grids = [made_grid(value) for value in (10, 20, 30)]
    for grid in grids:
        handed.prepare(grid)

    for grid in reversed(grids):
        given(handed, grid, tmp_path)
    for number, grid in enumerate(grids):
        given(handed, grid, tmp_path, str(number))

    assert writings[:3] == [10, 20, 30]


def test_another_grid_does_not_change_what_the_model_kept(handed, tmp_path):
    first, second = made_grid(1), made_grid(2)
    handed.prepare(second)
    kept = given(handed, first, tmp_path)

    given(handed, second, tmp_path)

    assert np.array_equal(kept.values, first.values)


def test_nothing_lies_aside_of_a_grid_that_nobody_has_any_more(handed, tmp_path):
    grid = made_grid(1)
    handed.prepare(grid)
    assert files_of(tmp_path / "aside")

    del grid

    assert list((tmp_path / "aside").iterdir()) == []
    assert handed._written == {}


def test_what_is_being_written_is_waited_for(handed, writings, tmp_path, monkeypatch):
    begun, may = threading.Event(), threading.Event()
    write = handing.write_grid

    def slowly(grid, folder):
        begun.set()
        assert may.wait(20)
        return write(grid, folder)

    monkeypatch.setattr(handing, "write_grid", slowly)
    grid = made_grid(3)
    with ThreadPoolExecutor() as pool:
        preparing = pool.submit(handed.prepare, grid)
        assert begun.wait(20)
        giving = pool.submit(given, handed, grid, tmp_path)
        closing = pool.submit(handed.close)
        may.set()
        for done in (preparing, giving, closing):
            done.result(20)

    assert writings == [3]


def test_what_is_closed_writes_nothing_more(handed, tmp_path):
    handed.close()

    handed.prepare(made_grid(1))

    assert files_of(tmp_path) == []


def test_what_could_not_be_prepared_is_written_when_it_is_given(handed, tmp_path, monkeypatch):
    write = handing.write_grid

    def half(grid, folder):
        write(grid, folder)
        raise OSError(28, "no space")

    grid = made_grid(5)
    with monkeypatch.context() as patched:
        patched.setattr(handing, "write_grid", half)
        with pytest.raises(OSError, match="no space"):
            handed.prepare(grid)

    given(handed, grid, tmp_path)
    del grid
    assert list((tmp_path / "aside").iterdir()) == []
