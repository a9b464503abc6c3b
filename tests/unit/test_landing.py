"""Whatever the pieces, the file system and the disk do: the file holds what came, and its lead comes last."""

from __future__ import annotations

import errno
import fcntl
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom_node import landing as landing_module
from dicom_node.landing import BLOCK, Landing, borrow, give_back, memory

pytestmark = pytest.mark.usefixtures("either_way")
SIZE = len(memory())
LEAD = b"lead" * 70
CONTENT = random.Random(1).randbytes(3 * SIZE + BLOCK + 77)


def landed(path, content: bytes, steps, room: memoryview | None = None, lead: bytes = LEAD) -> None:
    """Let `content` come in steps, and keep it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    landing = Landing(descriptor, memory() if room is None else room, lead=len(lead))
    try:
        fill(landing, content, steps)
        assert landing.size == len(lead) + len(content)
        landing.keep(lead)
        assert landing.size == len(lead) + len(content)
        assert is_closed(descriptor)
    finally:
        landing.close()
    assert is_closed(descriptor)


def is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as error:
        return error.errno == errno.EBADF
    return False


def fill(landing: Landing, content: bytes, steps) -> None:
    at, step = 0, iter(steps)
    while at < len(content):
        room = landing.room()
        assert room
        number = min(len(room), len(content) - at, next(step, SIZE))
        room[:number] = content[at : at + number]
        landing.took(number)
        at += number


@settings(max_examples=60, deadline=None)
@given(
    size=st.one_of(
        st.integers(1, 3 * BLOCK),
        st.integers(-BLOCK, BLOCK).map(lambda near: SIZE - len(LEAD) + near),
        st.integers(1, len(CONTENT)),
    ),
    steps=st.lists(st.integers(1, SIZE), max_size=20),
)
def test_the_file_is_its_lead_and_what_came(tmp_path_factory, size, steps):
    path = tmp_path_factory.mktemp("landing") / "file"

    landed(path, CONTENT[:size], steps)

    assert path.read_bytes() == LEAD + CONTENT[:size]


@pytest.mark.parametrize("size", [10, SIZE // 2, 2 * SIZE + 5])
def test_memory_is_used_again_and_nothing_of_the_file_before_is_left(tmp_path, size):
    room = memory()
    landed(tmp_path / "first", b"x" * (SIZE + 5 * BLOCK), [], room)

    landed(tmp_path / "second", CONTENT[:size], [], room)

    assert (tmp_path / "second").read_bytes() == LEAD + CONTENT[:size]


@pytest.mark.parametrize("size", [10, BLOCK, SIZE - len(LEAD), SIZE, 2 * SIZE + 5])
def test_all_that_came_can_be_looked_at_before_it_is_kept_and_the_lead_is_not_there_yet(tmp_path, size):
    room = memory()
    landed(tmp_path / "before", b"y" * BLOCK, [], room)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    landing = Landing(descriptor, room, lead=len(LEAD))
    fill(landing, CONTENT[:size], [])

    with landing.whole() as whole:
        assert bytes(whole) == bytes(len(LEAD)) + CONTENT[:size]
    assert LEAD[:8] not in (tmp_path / "file").read_bytes()

    landing.keep(LEAD)
    assert (tmp_path / "file").read_bytes() == LEAD + CONTENT[:size]


@pytest.mark.parametrize("size", [BLOCK // 2, SIZE // 2, 2 * SIZE + 5])
def test_the_lead_is_written_last_and_the_sync_follows(tmp_path, size, monkeypatch, in_python):
    done: list[int | str] = []
    pwrite, fsync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda fd, piece, at: (done.append(at), pwrite(fd, piece, at))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), fsync(fd))[1])

    landed(tmp_path / "file", CONTENT[:size], [])

    assert done[-2:] == [0, "sync"]
    assert 0 not in done[:-2]


def test_where_there_is_no_way_past_the_page_cache_all_is_written_the_usual_way(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    monkeypatch.setattr(fcntl, "fcntl", refused)

    landed(tmp_path / "file", CONTENT, [])

    assert (tmp_path / "file").read_bytes() == LEAD + CONTENT


def test_where_blocks_are_larger_all_is_written_the_usual_way(tmp_path, monkeypatch):
    pwrite = os.pwrite

    def picky(descriptor, piece, at):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "blocks of 64 kB")
        return pwrite(descriptor, piece, at)

    monkeypatch.setattr(os, "pwrite", picky)

    landed(tmp_path / "file", CONTENT, [])

    assert (tmp_path / "file").read_bytes() == LEAD + CONTENT


@pytest.mark.parametrize("most", [3 * BLOCK, 10_001])
def test_a_disk_that_takes_a_part_gets_the_rest(tmp_path, monkeypatch, most):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, piece, at: pwrite(fd, piece[:most], at))

    landed(tmp_path / "file", CONTENT, [100_000] * 9)

    assert (tmp_path / "file").read_bytes() == LEAD + CONTENT


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_disk_that_takes_no_more_is_said(tmp_path, monkeypatch, failing):
    pwrite, calls = os.pwrite, iter(range(1, 1000))

    def full(descriptor, piece, at):
        if next(calls) >= failing:
            raise OSError(errno.ENOSPC, "full")
        return pwrite(descriptor, piece, at)

    monkeypatch.setattr(os, "pwrite", full)

    with pytest.raises(OSError, match="full"):
        landed(tmp_path / "file", CONTENT, [])


def test_in_c_too_a_disk_that_takes_no_more_is_said():
    landing = Landing(os.open("/dev/full", os.O_WRONLY), memory(), lead=8)

    with pytest.raises(OSError, match="No space left") as caught:
        landing.keep(LEAD[:8])

    assert caught.value.errno == errno.ENOSPC
    landing.close()


@pytest.mark.parametrize("size", [10, SIZE // 2, 2 * SIZE + 5])
def test_what_somebody_has_deleted_meanwhile_is_not_kept(tmp_path, size):
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    landing = Landing(descriptor, memory(), lead=len(LEAD))
    fill(landing, CONTENT[:size], [])
    (tmp_path / "file").unlink()

    with pytest.raises(OSError, match="Stale") as caught:
        landing.keep(LEAD)

    assert caught.value.errno == errno.ESTALE
    assert not is_closed(descriptor)
    landing.close()
    assert is_closed(descriptor)


def test_memory_that_is_given_back_is_borrowed_again_and_some_of_it_is_kept(monkeypatch):
    monkeypatch.setattr(landing_module, "_idle", [])
    first, second = borrow(), borrow()
    assert first is not second
    give_back(first)

    assert borrow() is first
    for _ in range(100):
        give_back(memory())
    assert len(landing_module._idle) == 32
