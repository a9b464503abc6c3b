"""What processes beside the worker decode is what the worker would decode, whatever becomes of them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom.uid import JPEG2000Lossless, RLELossless

from dicom_node.errors import InputRefused
from tests.datasets import EXPLICIT, as_file, ct, write
from workers import decoding
from workers.decoding import Decoders, count_for, is_dear
from workers.device import moved
from workers.slices import read_header
from workers.volume import load

SLICES = 20


def children() -> set[str]:
    """The processes that this one has started and not yet waited for."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found |= set((task / "children").read_text().split())
    return found


def compressed(number: int, syntax: str, path: Path) -> Path:
    image = as_file(ct(number), EXPLICIT)
    image.Rows = image.Columns = 64
    image.PixelData = np.random.default_rng(number).integers(0, 3000, (64, 64), np.int16).tobytes()
    image.compress(syntax, generate_instance_uid=False)
    image.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def paths(tmp_path):
    return [compressed(number, JPEG2000Lossless, tmp_path / f"{number}.dcm") for number in range(1, SLICES + 1)]


@pytest.fixture
def asked(monkeypatch):
    """Two processors, which are enough here, and what their processes are asked."""
    asked = []
    monkeypatch.setattr(decoding, "_MANY", SLICES)
    monkeypatch.setattr(decoding, "_FEW", 2)
    ask = decoding._Decoder.ask
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(decoding._Decoder, "ask", lambda self, *of: asked.append((self, of)) or ask(self, *of))
    return asked


@pytest.fixture
def expected(paths, monkeypatch):
    with monkeypatch.context() as alone:
        alone.setattr(os, "sched_getaffinity", lambda _: {0})
        return load(paths).grid.values


def test_a_series_is_decoded_by_several_processes_and_none_is_left(paths, expected, asked):
    before = children()

    values = load(paths).grid.values

    assert np.array_equal(values, expected)
    assert len(asked) == SLICES
    assert len({one for one, _ in asked}) == 2
    assert all(one._process.returncode is not None for one, _ in asked)
    assert children() <= before  # one that an earlier test left may end meanwhile


def test_what_a_process_dies_of_is_decoded_in_the_worker(paths, expected, asked, monkeypatch):
    ask, killed = decoding._Decoder.ask, []

    def dies(self, path, frames):
        if len(asked) in (3, 9):
            self._process.kill()
            self._process.wait()
            killed.append(path)
        return ask(self, path, frames)

    monkeypatch.setattr(decoding._Decoder, "ask", dies)

    assert np.array_equal(load(paths).grid.values, expected)
    assert killed


def test_what_cannot_be_decoded_is_refused_as_ever(paths, asked):
    content = bytearray(paths[7].read_bytes())
    start = content.index(b"\xff\x4f\xff\x51")
    content[start + 4 : start + 40] = bytes(36)
    paths[7].write_bytes(content)

    with pytest.raises(InputRefused):
        load(paths)

    assert asked


def test_frames_of_one_file_come_in_the_order_they_were_asked_for(paths, asked):
    header = read_header(paths[0])
    with Decoders(1) as decode:
        (frame,) = decode(paths[0], header, [0])
        (again,) = decode(paths[0], header, [0])

    assert frame.shape == (header.Rows, header.Columns)
    assert np.array_equal(frame, again)
    assert len({one for one, _ in asked}) == 1


def test_only_for_many_frames_that_are_dear_is_a_process_started(paths, asked, tmp_path):
    load(paths[:5])
    plain = read_header(write(ct(1), tmp_path / "plain.dcm"))
    rle = read_header(compressed(1, RLELossless, tmp_path / "rle.dcm"))

    assert not asked
    assert [count_for(number) for number in (0, SLICES - 1, SLICES)] == [0, 0, 2]
    assert is_dear(read_header(paths[0]))
    assert not is_dear(plain)
    assert not is_dear(rle)


def test_a_tensor_goes_to_a_gpu_from_pinned_memory_while_the_processor_goes_on(monkeypatch):
    """There is no GPU here: what torch is asked for at its edge, no more."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where, **how: calls.append((where, how)) or self)

    moved(torch.zeros(2), torch.device("cuda:1"))
    moved(torch.zeros(2), torch.device("cpu"))

    assert calls == ["pinned", ((torch.device("cuda:1"),), {"non_blocking": True}), ((torch.device("cpu"),), {})]
