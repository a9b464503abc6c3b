"""The soak of `tests.fuzz.soak`, short; `python -m tests.fuzz.soak --minutes 60` is the long one."""

from __future__ import annotations

import time

import pytest

from tests.fuzz.conftest import Watched
from tests.fuzz.soak import soak, started_node


@pytest.fixture
def alone(tmp_path):
    node = started_node(tmp_path)
    yield Watched(node)
    node.end()


@pytest.mark.timeout(280)
def test_twenty_seconds_of_everything_hold_up_no_honest_sender_and_leave_nothing(alone):
    seen = soak(alone, seconds=20, seed=int(time.time()))

    assert int(str(seen["attacks"])) > 20


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifteen_minutes_of_everything(alone):
    soak(alone, seconds=900, seed=int(time.time()))
