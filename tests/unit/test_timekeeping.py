"""A clock that is set back makes nothing wait for the time that it has gained."""

from __future__ import annotations

import pytest

from dicom_node.config import parse
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Happening
from dicom_node.timekeeping import Timekeeping
from tests.unit.test_ledger import claim, due, inference, names, receive

NOON = 1_800_000_000.0
HOUR = 3600.0


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite3'}", migrate=True)
    yield made
    made.close()


@pytest.fixture
def keeping(ledger, tmp_path):
    return Timekeeping(parse("", base=tmp_path), ledger)


def test_a_job_that_waits_is_due_at_once_when_the_clock_goes_back_an_hour(ledger, keeping):
    number = inference(ledger)
    held = claim(ledger, number, now=NOON)
    ledger.jobs.ended(held, Happening.POSTPONED, now=NOON, reason="r", not_before=NOON + 300)
    assert not keeping.tick(now=NOON, monotonic=100.0)

    assert keeping.tick(now=NOON - HOUR, monotonic=101.0)

    assert due(ledger, now=NOON - HOUR) == [number]
    assert claim(ledger, number, now=NOON - HOUR) is not None


def test_a_lease_of_a_dead_worker_runs_out_by_the_new_clock(ledger, keeping):
    number = inference(ledger)
    claim(ledger, number, now=NOON)
    keeping.tick(now=NOON, monotonic=100.0)

    keeping.tick(now=NOON - HOUR, monotonic=101.0)

    assert ledger.jobs.recover(maximum_deaths=3, now=NOON - HOUR + 59) == 0
    assert ledger.jobs.recover(maximum_deaths=3, now=NOON - HOUR + 61) == 1


def test_a_series_that_is_open_is_not_silent_for_an_hour(ledger, keeping):
    receive(ledger, now=NOON)
    keeping.tick(now=NOON, monotonic=100.0)

    keeping.tick(now=NOON - HOUR, monotonic=101.0)

    (series,) = ledger.arrivals.open_series()
    assert series.last_activity == NOON - HOUR


def test_a_clock_that_was_set_back_while_the_node_was_away_is_noticed_by_the_ledger(ledger, keeping):
    number = inference(ledger)
    claim(ledger, number, now=NOON)

    assert keeping.tick(now=NOON - HOUR, monotonic=5.0)

    assert "clock.set_back" in [event["name"] for event in ledger.history.recent_events(limit=10)]
    assert names(ledger, number)[-1] == "job.claimed"


def test_a_clock_that_is_disciplined_or_goes_forward_is_left_alone(ledger, keeping):
    keeping.tick(now=NOON, monotonic=100.0)

    assert not keeping.tick(now=NOON + 0.2, monotonic=101.0)
    assert not keeping.tick(now=NOON + HOUR, monotonic=102.0)
    assert not keeping.tick(now=NOON + HOUR + 1, monotonic=103.0)
