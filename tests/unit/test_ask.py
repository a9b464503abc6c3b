from __future__ import annotations

import pytest

from dicom_node.cli.ask import remaining


def test_a_running_job_says_how_long_it_still_needs():
    row = {"state": "running", "started_at": 100.0, "progress": 0.25}

    assert remaining(row, 110.0) == pytest.approx(30.0)


@pytest.mark.parametrize(
    "row",
    [
        {"state": "queued", "started_at": None, "progress": 0.0},
        {"state": "running", "started_at": 100.0, "progress": 0.01},
        {"state": "done", "started_at": 100.0, "progress": 1.0},
    ],
)
def test_where_nobody_can_tell_nothing_is_told(row):
    assert remaining(row, 110.0) is None
