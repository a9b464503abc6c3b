"""The long plan, short: processes killed, the disk filled, the broker flushed, the destination bounced, under load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults.plan", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=3600, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_plan_loses_misses_and_doubles_nothing():
    done = run("--minutes", "0.5", "--seed", "7", "--calm", "3", "--scanners", "2")

    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert "instances lost, results missing, results doubled: 0, 0, 0" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "options",
    [("--seed", "11"), ("--seed", "12", "--ledger", "postgresql", "--broker", "redis")],
    ids=["embedded", "PostgreSQL and Redis"],
)
def test_the_long_plan_loses_misses_and_doubles_nothing(options):
    done = run("--minutes", "20", *options)
    print(done.stdout)

    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
