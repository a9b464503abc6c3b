from __future__ import annotations

import threading
import time

import pytest

from dicom_node.gathering import Gathering

LONG = 30.0  # seconds that no test waits


def test_a_group_comes_together_within_its_time():
    gathering = Gathering[int](most=10, seconds=0.3)
    threading.Timer(0.05, gathering.put, [1]).start()
    threading.Timer(0.15, gathering.put, [2]).start()
    assert gathering.take() == [1, 2]


@pytest.mark.parametrize("last", ["the third", "one that cannot wait"])
def test_a_full_group_and_one_that_cannot_wait_are_taken_at_once(last):
    gathering = Gathering[int](most=3, seconds=LONG)
    began = time.monotonic()
    gathering.put(1)
    if last == "the third":
        gathering.put(2)
        gathering.put(3)
        assert gathering.take() == [1, 2, 3]
    else:
        gathering.put(2, at_once=True)
        assert gathering.take() == [1, 2]
    assert time.monotonic() - began < LONG / 2


def test_what_is_more_than_a_group_is_the_next_one_in_order():
    gathering = Gathering[int](most=3, seconds=LONG)
    for number in range(7):
        gathering.put(number)
    assert [gathering.take(), gathering.take(), gathering.take()] == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_next_group_has_its_own_time():
    gathering = Gathering[int](most=3, seconds=0.2)
    gathering.put(1, at_once=True)
    gathering.take()
    gathering.put(2)
    threading.Timer(0.05, gathering.put, [3]).start()
    assert gathering.take() == [2, 3]


def test_after_all_was_taken_nothing_is_left_to_wake_for():
    gathering = Gathering[int](most=3, seconds=0.01)
    gathering.put(1, at_once=True)
    assert gathering.take_all() == [1]
    threading.Timer(0.05, gathering.put, [2]).start()
    assert gathering.take() == [2]


def test_closed_it_gives_what_is_left_and_then_nothing():
    gathering = Gathering[int](most=2, seconds=LONG)
    for number in range(3):
        gathering.put(number)
    gathering.close()
    assert [gathering.take(), gathering.take(), gathering.take()] == [[0, 1], [2], []]


def test_whoever_waits_when_it_is_closed_is_let_go():
    gathering = Gathering[int](most=2, seconds=LONG)
    taken: list[list[int]] = []
    waiting = threading.Thread(target=lambda: taken.append(gathering.take()))
    waiting.start()
    gathering.close()
    waiting.join(LONG)
    assert taken == [[]]


def test_nothing_is_lost_or_doubled_between_many_threads():
    gathering = Gathering[tuple[int, int]](most=7, seconds=0.001)
    taken: list[tuple[int, int]] = []

    def take():
        while group := gathering.take():
            taken.extend(group)

    def put(thread: int):
        for number in range(500):
            gathering.put((thread, number), at_once=number % 50 == 0)

    taking = threading.Thread(target=take)
    putting = [threading.Thread(target=put, args=[thread]) for thread in range(4)]
    for thread in [taking, *putting]:
        thread.start()
    for thread in putting:
        thread.join()
    gathering.close()
    taking.join(LONG)
    assert sorted(taken) == [(thread, number) for thread in range(4) for number in range(500)]
    for thread in range(4):
        assert [number for where, number in taken if where == thread] == list(range(500))
