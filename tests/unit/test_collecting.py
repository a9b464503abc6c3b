"""What pynetdicom collects is bounded: each data set by what it belongs to, all together by the room there is."""

from __future__ import annotations

import pytest

from dicom_node.collecting import Collected, Room, is_dropped

MEGABYTE = bytes(1 << 20)


def collected(room: Room, megabytes: int, message: str = "N_ACTION_RQ") -> Collected:
    data_set = Collected(room)
    data_set.belongs_to(message)
    for _ in range(megabytes):
        assert data_set.write(MEGABYTE) == len(MEGABYTE)
    return data_set


def test_what_fits_is_kept_and_its_room_comes_back_when_nobody_has_it_any_more():
    room = Room(8 << 20)
    data_set = collected(room, 6)

    assert data_set.getvalue() == MEGABYTE * 6
    assert not is_dropped(data_set)
    assert room.left < 3 << 20

    del data_set
    assert room.left == 8 << 20


@pytest.mark.parametrize(("message", "megabytes"), [("N_ACTION_RQ", 17), ("C_FIND_RQ", 1), ("C_ECHO_RSP", 1)])
def test_what_is_larger_than_its_message_means_is_not_kept(message, megabytes):
    room = Room()
    data_set = collected(room, megabytes, message)

    assert is_dropped(data_set)
    assert data_set.getvalue() == b""
    assert room.left == Room().left


def test_where_the_others_have_it_all_a_small_one_is_kept_and_a_large_one_is_not():
    room = Room(4 << 20)
    others = [collected(room, 3), collected(room, 3)]
    small = Collected(room)
    small.write(MEGABYTE[: 1 << 19])

    assert [is_dropped(each) for each in [*others, collected(room, 3), small]] == [False, True, True, False]


def test_what_was_dropped_stays_dropped():
    data_set = collected(Room(), 20)
    data_set.write(b"x")

    assert (data_set.getvalue(), is_dropped(data_set)) == (b"", True)
