"""A volume that was read before it was asked for is given once, and only where nothing about it has changed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dicom_node.errors import InputRefused
from dicom_node.ledger.arrivals import StoredInstance
from dicom_node.manifest import InputSlot
from workers.foresight import Foresight

CT, MR = InputSlot(modality=["CT"]), InputSlot(modality=["MR"])
SERIES = [StoredInstance(f"1.2.{number}", "1.2.840.10008.5.1.4.1.1.2", f"p/{number}", "ab", None) for number in (1, 2)]
OTHER = [StoredInstance("1.3.1", "1.2.840.10008.5.1.4.1.1.2", "p/9", "ab", None)]


class Loading:
    """Makes something new at each call, when it may."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, InputSlot]] = []
        self.may, self.begun, self.fails = threading.Event(), threading.Event(), False
        self.may.set()

    def __call__(self, instances, slot):
        self.calls.append((len(instances), slot))
        self.begun.set()
        assert self.may.wait(20)
        if self.fails:
            raise InputRefused("no images")
        return object()


class Held:
    """Says when nobody holds it any more."""

    gone = threading.Event()

    def __del__(self) -> None:
        self.gone.set()


@pytest.fixture
def loading():
    return Loading()


def test_what_was_foreseen_is_not_loaded_again_and_given_once(loading):
    volumes = Foresight(loading)
    volumes.foresee(SERIES, CT)

    first, second = volumes(SERIES, CT), volumes(SERIES, CT)

    assert first is not second
    assert len(loading.calls) == 2


@pytest.mark.parametrize(
    ("instances", "slot"),
    [
        (SERIES[:1], CT),
        ([*SERIES, *OTHER], CT),
        (SERIES, MR),
        ([SERIES[0], SERIES[1]._replace(digest="cd")], CT),
        ([SERIES[0], SERIES[1]._replace(path="p/7")], CT),
        (OTHER, CT),
    ],
)
def test_what_is_another_series_or_wanted_otherwise_is_loaded(loading, instances, slot):
    volumes = Foresight(loading)
    volumes.foresee(SERIES, CT)

    volumes(instances, slot)
    assert loading.calls == [(2, CT), (len(instances), slot)]

    volumes(SERIES, CT)
    assert len(loading.calls) == 2


def test_what_is_held_is_kept_until_it_has_grown(loading):
    volumes = Foresight(loading)
    assert volumes.foresee(SERIES[:1], CT)

    assert not volumes.foresee(OTHER, CT)
    assert not volumes.foresee(SERIES[:1], CT)  # another node says so too
    assert loading.calls == [(1, CT)]
    assert volumes.foresee(SERIES, CT)
    assert loading.calls == [(1, CT), (2, CT)]
    volumes(SERIES, CT)
    assert len(loading.calls) == 2


def test_who_asks_while_it_is_being_read_waits_for_it(loading):
    volumes = Foresight(loading)
    loading.may.clear()
    with ThreadPoolExecutor(2) as pool:
        foreseen = pool.submit(volumes.foresee, SERIES, CT)
        assert loading.begun.wait(20)
        asked = pool.submit(volumes, SERIES, CT)
        assert not asked.done()
        loading.may.set()
        foreseen.result(20)
        assert asked.result(20) is not None

    assert len(loading.calls) == 1


def test_who_asks_for_another_while_it_is_being_read_does_not_wait(loading):
    volumes = Foresight(lambda instances, slot: loading(instances, slot) if instances == SERIES else "other")
    loading.may.clear()
    with ThreadPoolExecutor(1) as pool:
        foreseen = pool.submit(volumes.foresee, SERIES, CT)
        assert loading.begun.wait(20)

        assert volumes(OTHER, CT) == "other"

        loading.may.set()
        foreseen.result(20)
    volumes(SERIES, CT)
    assert len(loading.calls) == 1


def test_what_cannot_be_read_is_tried_again_by_who_asks_and_hears_why(loading):
    volumes = Foresight(loading)
    loading.fails = True
    with pytest.raises(InputRefused):
        volumes.foresee(SERIES, CT)

    with pytest.raises(InputRefused):
        volumes(SERIES, CT)
    loading.fails = False
    assert volumes(SERIES, CT) is not None


def test_what_nobody_asks_for_is_let_go(loading):
    volumes = Foresight(lambda instances, slot: loading(instances, slot) and Held(), kept=0.1)
    volumes.foresee(SERIES, CT)

    assert Held.gone.wait(20)

    volumes(SERIES, CT)
    assert len(loading.calls) == 2


def test_the_time_of_what_was_given_is_not_that_of_the_next(loading):
    volumes = Foresight(loading, kept=0.3)
    volumes.foresee(SERIES, CT)
    volumes(SERIES, CT)
    volumes.foresee(OTHER, CT)

    time.sleep(0.2)
    volumes(OTHER, CT)

    assert len(loading.calls) == 2
