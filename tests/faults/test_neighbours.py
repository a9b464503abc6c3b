"""What the node leans on goes away under load: its ledger is locked, broken, restarted; its clock is set back."""

from __future__ import annotations

import errno
import random
import sqlite3
import time
from collections.abc import Iterator

import pytest

from tests.acceptance.stand import wait_for
from tests.faults import promises
from tests.faults.conftest import MODEL
from tests.faults.keeper import Keeper
from tests.faults.scanner import Scanner
from tests.faults.servers import PostgreSQL
from tests.faults.shim import FOREVER, Act

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def postgresql() -> Iterator[PostgreSQL]:
    if not PostgreSQL.is_here():
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    made = PostgreSQL()
    yield made
    made.end()


def begin(running, studies, archive) -> Scanner:
    """Send studies; return when some of them have arrived."""
    scanner = Scanner(running.port, studies, chance=random.Random(3), ticks=archive.ticks, timeout=40.0)
    scanner.start()
    wait_for("the first instances", lambda: len(scanner.acknowledged) > 5)
    return scanner


def end(running, scanner: Scanner, studies, archive) -> None:
    """Wait until all is well; check every promise."""
    scanner.join(120)
    assert not scanner.is_alive(), running.log()[-4000:]
    promises.wait_until_settled(running, studies, models=[MODEL])
    received = [each.dataset() for each in archive.holds().values()]
    promises.all_kept(running, scanner.acknowledged, received, studies, models=[MODEL])
    promises.same_bytes(archive.received)
    assert "defect" not in running.log()


def test_a_postgresql_that_crashes_and_is_restarted_under_load_loses_nothing(node, archive, studies, postgresql):
    running = node(node=f'ledger = "{postgresql.url}"').start()
    keeper = Keeper(running)
    scanner = begin(running, studies, archive)
    for mode, away in (("immediate", 0.1), ("fast", 6.0)):
        postgresql.stop(mode)
        time.sleep(away)
        postgresql.start()
        time.sleep(2.0)
    end(running, scanner, studies, archive)
    assert keeper.lives == 1, f"the node did not outlive its ledger: {keeper.codes}"
    keeper.end()


@pytest.mark.slow
def test_a_ledger_locked_for_longer_than_it_is_waited_for_costs_time_and_nothing_else(node, archive, studies):
    running = node().start()
    scanner = begin(running, studies[:2], archive)
    connection = sqlite3.connect(running.folder / "storage" / "ledger.sqlite3", timeout=10, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    time.sleep(20)
    connection.rollback()
    connection.close()
    end(running, scanner, studies[:2], archive)


@pytest.mark.slow
def test_a_ledger_that_nobody_can_write_for_a_while_costs_time_and_nothing_else(shimmed, archive, studies):
    running, shim = shimmed()
    running.start()
    scanner = begin(running, studies[:2], archive)
    for error in (errno.EIO, errno.ENOSPC, errno.EROFS):
        shim.arm(Act.FAIL, "* ledger*", span=FOREVER, error=error)
        time.sleep(4)
        shim.disarm()
        time.sleep(1)
    end(running, scanner, studies[:2], archive)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [-3600, -20, 7200])
def test_a_clock_that_is_set_under_load_delays_nothing_by_the_time_it_was_set(shimmed, archive, studies, seconds):
    running, shim = shimmed()
    running.start()
    scanner = begin(running, studies[:2], archive)
    shim.set_clock(seconds)
    end(running, scanner, studies[:2], archive)


@pytest.mark.slow
def test_a_clock_that_is_set_back_while_the_node_is_away_delays_nothing(shimmed, archive, studies):
    running, shim = shimmed()
    running.start()
    scanner = begin(running, studies[:2], archive)
    running.kill()
    shim.set_clock(-3600)
    running.start()
    end(running, scanner, studies[:2], archive)


def test_a_second_node_on_the_same_storage_is_refused_and_the_first_goes_on(node, archive, studies):
    running = node().start()
    other = node()
    other.settings_path.write_text(
        other.settings_path.read_text().replace('storage = "storage"', f'storage = "{running.folder / "storage"}"')
    )
    other.spawn()

    assert other.process.wait(60) != 0
    assert "another node runs on" in other.log()
    assert running.answers()
