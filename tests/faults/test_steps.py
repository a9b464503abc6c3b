"""SIGKILL before and after each durable step of the pipeline; a full or broken disk at each of them."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Iterator

import pytest

from tests.acceptance.stand import wait_for
from tests.faults import promises
from tests.faults.conftest import MODEL, write_studies
from tests.faults.keeper import Keeper
from tests.faults.scanner import Acknowledged, Image, Scanner
from tests.faults.shim import Act, Shim, steps

pytestmark = pytest.mark.timeout(900)

Blow = tuple[Act, str, int, int]
"""What is done, to which step, at its which occurrence, with which errno."""


class Ward:
    """One node that is hurt again and again, under a scanner that goes on sending."""

    def __init__(self, running, shim: Shim, archive) -> None:
        self.running, self.shim, self.archive = running, shim, archive
        self.keeper = Keeper(running)
        self.acknowledged: dict[str, Acknowledged] = {}
        self.studies: list[list[Image]] = []
        self.struck: list[str] = []

    def strike(self, blow: Blow, images: list[Image], chance: random.Random, *, span: int = 1) -> None:
        """Send one study while the blow waits for its step; go on until it has fallen, or all is delivered."""
        act, pattern, at, error = blow
        self.studies.append(images)
        self.shim.arm(act, pattern, at=at, span=span, error=error)
        scanner = Scanner(self.running.port, [images], chance=chance, ticks=self.archive.ticks)
        scanner.start()

        def over() -> bool:
            return bool(self.shim.acted) or (not scanner.is_alive() and self.is_settled())

        wait_for(f"{blow} to fall, or all to be well", over, seconds=90)
        if self.shim.acted:
            self.struck.append(f"{act.name} {self.shim.acted}")
        if span == 1:
            self.shim.disarm()
        scanner.join(90)
        assert not scanner.is_alive(), f"{blow}: not everything was acknowledged\n{self.running.log()[-4000:]}"
        self.shim.disarm()
        self.acknowledged |= scanner.acknowledged

    def is_settled(self) -> bool:
        return promises.settled(self.running, self.studies, models=[MODEL])

    def check(self) -> None:
        promises.wait_until_settled(self.running, self.studies, models=[MODEL])
        self.keeper.end()
        received = [each.dataset() for each in self.archive.holds().values()]
        promises.all_kept(self.running, self.acknowledged, received, self.studies, models=[MODEL])
        promises.same_bytes(self.archive.received)
        assert "defect" not in self.running.log()


@pytest.fixture
def ward(shimmed, archive) -> Iterator[Ward]:
    running, shim = shimmed(journal=True)
    made = Ward(running.start(), shim, archive)
    yield made
    made.keeper.end()


RECEIVING = "node * studies/*.dcm", "node * arrived/*", "node fsync ledger.sqlite3-wal"
INFERRING = "infer fsync incoming/*", "infer rename results/*", "infer fsync ledger.sqlite3-wal"
DELIVERING = "deliver write ledger.sqlite3-wal", "deliver fsync ledger.sqlite3-wal"


def test_a_process_killed_at_a_step_of_receiving_inferring_and_delivering_loses_and_doubles_nothing(ward, studies):
    chance = random.Random(21)
    for images, patterns in zip(studies, (RECEIVING, INFERRING, DELIVERING), strict=False):
        act = chance.choice([Act.KILL_BEFORE, Act.KILL_AFTER])
        ward.strike((act, chance.choice(patterns), chance.randint(1, 3), 0), images, chance)
    ward.check()
    assert len(ward.struck) == 3, ward.struck


def test_a_disk_that_is_full_for_a_while_costs_retries_and_nothing_else(ward, studies):
    chance = random.Random(22)
    ward.strike((Act.FAIL, "node write *", 25, errno.ENOSPC), studies[0], chance, span=12)
    ward.strike((Act.FAIL, "infer * results/*", 1, errno.ENOSPC), studies[1], chance, span=5)
    ward.strike((Act.FAIL, "* fsync ledger*", 20, errno.EIO), studies[2], chance, span=2)
    ward.check()
    assert len(ward.struck) == 3, ward.struck


# -- every step -----------------------------------------------------------------------------------------------


def recorded(ward: Ward, images: list[Image]) -> tuple[list[str], list[str]]:
    """Return the steps of a start, and those of one study, as a run without blows shows them."""
    wait_for("the workers", lambda: len(ward.running.children_pids("-m workers")) == 2)
    started = ward.shim.count
    ward.strike((Act.KILL_AFTER, "nothing", 1, 0), images, random.Random(1))
    operations = ward.shim.operations()
    starting = steps([operation for operation in operations if operation.number <= started])
    return starting, steps([operation for operation in operations if operation.number > started])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("act", [Act.KILL_BEFORE, Act.KILL_AFTER])
def test_a_kill_at_every_step_of_a_study_loses_and_doubles_nothing(ward, tmp_path, act):
    chance = random.Random(31)
    made = iter(write_studies(tmp_path / "many", 120, first=1000))
    _, working = recorded(ward, next(made))
    blows = [(act, pattern, at, 0) for pattern in working for at in (1, 3)]
    for blow, images in zip(blows, made, strict=False):
        ward.strike(blow, images, chance)
    ward.check()
    print(len(ward.struck), "of", len(blows), "fell:", *ward.struck, sep="\n")
    assert len(ward.struck) > len(blows) // 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_full_or_broken_disk_at_every_step_of_a_study_loses_and_doubles_nothing(ward, tmp_path):
    chance = random.Random(32)
    made = iter(write_studies(tmp_path / "many", 120, first=2000))
    _, working = recorded(ward, next(made))
    blows = [
        (Act.FAIL, pattern, at, error)
        for pattern, (at, error) in itertools.product(working, ((1, errno.ENOSPC), (2, errno.EIO)))
        if "unlink" not in pattern or error == errno.EIO
    ]
    for blow, images in zip(blows, made, strict=False):
        ward.strike(blow, images, chance)
    ward.check()
    print(len(ward.struck), "of", len(blows), "fell:", *ward.struck, sep="\n")
    assert len(ward.struck) > len(blows) // 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_kill_at_every_step_of_the_first_start_leaves_a_node_that_starts(shimmed, archive, studies):
    running, shim = shimmed(journal=True)
    running.start()
    starting = steps(shim.operations())
    running.end()
    for pattern, act in itertools.product(starting, (Act.KILL_BEFORE, Act.KILL_AFTER)):
        again, shim = shimmed()
        shim.arm(act, pattern)
        keeper = start_despite(again, shim)
        keeper.end()
        again.end()


def start_despite(running, shim: Shim) -> Keeper:
    """Start a node that is killed at its first life; the next one must come up."""
    running.spawn()
    keeper = Keeper(running)
    wait_for("the node to be killed or to answer", lambda: shim.acted or running.answers(), seconds=60)
    shim.disarm()
    wait_for("the node to come back", running.answers, seconds=60)
    return keeper
