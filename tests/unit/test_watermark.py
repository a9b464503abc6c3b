from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from dicom_node.errors import LedgerUnavailable, SpoolFull, Unavailable
from dicom_node.spool import Spool
from dicom_node.watermark import Watermark


class Disk:
    """A file system with as much room as a test says, and a clock beside it."""

    def __init__(self, free: int) -> None:
        self.free, self.now, self.asked = free, 0.0, 0

    def free_of(self, _folder: Path) -> int:
        self.asked += 1
        return self.free

    def watermark(self, minimum: int) -> Watermark:
        return Watermark(Path("/nowhere"), minimum, free_of=self.free_of, clock=lambda: self.now)


def lets_in(watermark: Watermark, size: int = 0) -> bool:
    try:
        watermark.require_room(size)
    except SpoolFull:
        return False
    return True


def test_the_door_shuts_below_the_watermark_and_opens_by_itself_a_margin_above_it():
    disk = Disk(1000)
    watermark = disk.watermark(1000)
    seen = []
    for free in (1000, 999, 1000, 1050, 1099, 1100, 1001, 1000, 999):
        disk.free, disk.now = free, disk.now + 1.0
        seen.append(lets_in(watermark))

    assert seen == [True, False, False, False, False, True, True, True, False]


def test_a_thousand_instances_in_a_second_ask_the_file_system_four_times():
    disk = Disk(10**12)
    watermark = disk.watermark(1000)

    for _ in range(1000):
        disk.now += 0.001
        watermark.require_room(500_000)

    assert disk.asked <= 5


def test_a_shut_door_asks_the_file_system_as_rarely():
    disk = Disk(10)
    watermark = disk.watermark(1000)

    for _ in range(1000):
        disk.now += 0.001
        assert not lets_in(watermark)

    assert disk.asked <= 5


def test_what_is_let_in_between_two_looks_is_counted():
    disk = Disk(1500)
    watermark = disk.watermark(1000)

    for _ in range(50):  # all in one moment, as from many associations
        if lets_in(watermark, 100):
            disk.free -= 100

    assert disk.free == 1000


def test_one_that_is_too_large_is_refused_and_a_small_one_still_comes_in():
    watermark = Disk(1500).watermark(1000)

    assert not lets_in(watermark, 600)
    assert lets_in(watermark, 400)


def test_without_a_watermark_nobody_is_asked():
    disk = Disk(0)

    assert lets_in(disk.watermark(0), 10**12)
    assert disk.asked == 0


def test_a_change_is_told_once_however_many_were_refused():
    disk = Disk(10)
    watermark = disk.watermark(1000)
    told: list[tuple[str, int]] = []

    for _ in range(100):
        lets_in(watermark)
        watermark.tell(lambda *what: told.append(what))
    disk.free = 5000
    watermark.tell(lambda *what: told.append(what))
    watermark.tell(lambda *what: told.append(what))

    assert told == [("door.shut", 10), ("door.opened", 5000)]


def test_a_change_that_could_not_be_noted_is_noted_later():
    disk = Disk(10)
    watermark = disk.watermark(1000)
    told = []

    def away(*_what):
        raise LedgerUnavailable

    with pytest.raises(LedgerUnavailable):
        watermark.tell(away)
    watermark.tell(lambda *what: told.append(what))

    assert told == [("door.shut", 10)]


def test_threads_that_come_at_once_are_all_counted():
    disk = Disk(2000)
    watermark = disk.watermark(1000)
    taken: list[int] = []

    def take():
        for _ in range(100):
            if lets_in(watermark, 1):
                taken.append(1)

    threads = [threading.Thread(target=take) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    # the file system says 2000 however often it is asked: once for each time that the count has come down to 1000
    assert disk.asked == 2
    assert len(taken) == 2000


def test_a_folder_that_is_gone_is_unavailable_not_a_defect(tmp_path):
    spool = Spool(tmp_path / "storage", minimum_free=1)
    shutil.rmtree(tmp_path / "storage")

    with pytest.raises(Unavailable):
        spool.require_room()
    with pytest.raises(Unavailable):
        spool.watch_room(lambda *_: None)
