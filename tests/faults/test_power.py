"""The power goes: what was not synced is gone, and nothing that was promised is among it."""

from __future__ import annotations

import hashlib
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicom_node.part10 import dataset_digest
from tests.faults import promises
from tests.faults.archive import Archive, Received
from tests.faults.conftest import MODEL
from tests.faults.disk import Disk, restore
from tests.faults.keeper import Keeper
from tests.faults.scanner import Acknowledged, Image, Scanner
from tests.faults.shim import Act, Operation

pytestmark = pytest.mark.timeout(900)

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True)
class Recording:
    """One undisturbed run: every durable operation, and what was acknowledged and delivered between them."""

    operations: list[Operation]
    acknowledged: dict[str, Acknowledged]
    received: list[Received]
    studies: list[list[Image]]
    port: int

    @property
    def images(self) -> dict[str, Image]:
        return {image.sop_instance_uid: image for images in self.studies for image in images}


@pytest.fixture(scope="module")
def recording(tmp_path_factory, library, models, studies) -> Recording:
    from tests.acceptance.stand import NodeProcess
    from tests.faults.shim import Shim

    folder = tmp_path_factory.mktemp("recording")
    archive = Archive().start()
    running = NodeProcess(folder / "node", pacs_port=archive.port, node=f'models = "{models}"')
    shim = Shim(library, folder / "shim", root=running.folder / "storage", journal=True)
    running.environment.update(shim.environment)
    archive.ticks = lambda: shim.count
    try:
        running.start()
        scanner = Scanner(running.port, studies[:2], chance=random.Random(1), ticks=archive.ticks)
        scanner.start()
        scanner.join(60)
        promises.wait_until_settled(running, studies[:2], models=[MODEL])
    finally:
        running.end()
        archive.stop()
    return Recording(shim.operations(), scanner.acknowledged, archive.received, studies[:2], running.port)


def cuts(recording: Recording) -> Iterator[tuple[int, Disk]]:
    """Yield the disk after each operation; the last one first counts the operation that was done."""
    disk = Disk()
    for operation in recording.operations:
        disk.follow(operation)
        yield operation.number, disk


def test_no_file_has_its_name_before_all_of_its_bytes_are_safe(recording):
    images = recording.images
    seen = 0
    for _number, disk in cuts(recording):
        files = {path: node for path, node in disk.durable.items() if node is not None and path.endswith(".dcm")}
        if len(files) != seen:
            seen = len(files)
            promises.whole({path: bytes(node.content) for path, node in files.items()}, images)
    assert seen >= len(images)


def test_a_name_never_stands_for_less_than_the_whole_file(recording):
    """Not only after a power cut: whoever looks into `studies/` or `results/` while the node works sees whole files."""
    images = recording.images
    checked: set[str] = set()
    for _number, disk in cuts(recording):
        new = {
            path: node.settled(node.pending)
            for path, node in disk.names.items()
            if node is not None and path.endswith(".dcm") and path not in checked
        }
        promises.whole(new, images)
        checked |= new.keys()
    assert len(checked) >= len(images) + 2 * len(recording.studies)


@pytest.mark.parametrize("torn", [False, True], ids=["only what was synced", "some of the rest"])
def test_what_was_acknowledged_survives_at_whatever_moment(recording, torn):
    check_cuts(recording, every=9, torn=torn)


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True], ids=["only what was synced", "some of the rest"])
def test_what_was_acknowledged_survives_at_every_moment(recording, torn):
    check_cuts(recording, every=1, torn=torn)


@given(moment=st.floats(0.0, 1.0), chance=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_of_the_rest_a_power_cut_leaves_what_was_acknowledged_survives(recording, moment, chance):
    number = int(moment * recording.operations[-1].number)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        storage = Path(folder) / "storage"
        restore(disk_at(recording, number).after_power_cut(chance), storage)
        promised = [each.image for each in recording.acknowledged.values() if each.at <= number]
        check_storage(storage, promised, f"after operation {number}")


def disk_at(recording: Recording, number: int) -> Disk:
    """Return the disk after an operation."""
    disk = Disk()
    for operation in recording.operations:
        if operation.number > number:
            break
        disk.follow(operation)
    return disk


def check_cuts(recording: Recording, *, every: int, torn: bool) -> None:
    chance = random.Random(7)
    checked = 0
    for done, (number, disk) in enumerate(cuts(recording)):
        if done % every == 0:
            with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
                storage = Path(folder) / "storage"
                restore(disk.after_power_cut(chance if torn else None), storage)
                promised = [each.image for each in recording.acknowledged.values() if each.at <= number]
                check_storage(storage, promised, f"after operation {number}")
            checked += 1
    assert checked >= len(recording.operations) // every


def check_storage(storage: Path, promised: list[Image], when: str) -> None:
    """What was acknowledged is on disk; the ledger is sound and vouches for nothing that is not there."""
    there = {digest_of(path) for path in storage.rglob("*") if path.is_file() and path.parent != storage}
    missing = [image.sop_instance_uid for image in promised if image.digest not in there]
    assert not missing, f"{when}: acknowledged and gone: {missing}"
    path = storage / "ledger.sqlite3"
    if not path.exists() or path.stat().st_size == 0:
        assert not promised, f"{when}: acknowledged, and there is no ledger"
        return
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",), when
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
    if "result" in tables:
        for place, digest in connection.execute("SELECT path, digest FROM instance"):
            assert digest_of(storage / place) == digest, f"{when}: in the ledger and not on disk: {place}"
        for place, digest in connection.execute("SELECT path, sha256 FROM result"):
            content = (storage / place).read_bytes() if (storage / place).exists() else b""
            assert hashlib.sha256(content).hexdigest() == digest, f"{when}: in the ledger and not on disk: {place}"
    connection.close()


def digest_of(path: Path) -> str:
    """Return the digest of a file's data set; empty where there is none."""
    try:
        with path.open("rb") as file:
            return dataset_digest(file, "0" * 32)
    except (OSError, ValueError):
        return ""


# -- the real node on what is left ----------------------------------------------------------------------------


def revive(recording: Recording, node, archive, number: int, chance: random.Random | None) -> None:
    """Start a node on what a power cut after operation `number` left; nothing may be lost, missing or doubled."""
    disk = disk_at(recording, number)
    running = node(port=recording.port)  # the same node: its name in the ledger has its port
    restore(disk.after_power_cut(chance), running.folder / "storage")
    before = [each for each in recording.received if each.at <= number]
    archive.received.extend(before)
    running.start()
    scanner = Scanner(running.port, recording.studies)
    scanner.acknowledged = {uid: each for uid, each in recording.acknowledged.items() if each.at <= number}
    scanner._studies = [
        left
        for images in recording.studies
        if (left := [image for image in images if image.sop_instance_uid not in scanner.acknowledged])
    ]
    scanner.start()
    scanner.join(60)
    promises.wait_until_settled(running, recording.studies, models=[MODEL])
    received = [each.dataset() for each in archive.holds().values()]
    promises.all_kept(running, scanner.acknowledged, received, recording.studies, models=[MODEL])
    promises.same_bytes(archive.received)
    running.end()
    archive.received.clear()
    shutil.rmtree(running.folder)


def test_a_node_comes_back_after_a_power_cut_and_ends_with_every_result_once(recording, node, archive):
    moments = [each.at for each in recording.acknowledged.values()]
    revive(recording, node, archive, random.Random(3).choice(moments), random.Random(4))


@pytest.mark.slow
@pytest.mark.parametrize("torn", [False, True], ids=["only what was synced", "some of the rest"])
@pytest.mark.timeout(7200)
def test_a_node_comes_back_after_a_power_cut_at_many_moments(recording, node, archive, torn):
    last = recording.operations[-1].number
    for moment in range(20 if not torn else 40, last, max(1, last // 24)):
        revive(recording, node, archive, moment, random.Random(moment) if torn else None)


def test_power_cut_under_load_of_the_real_processes(shimmed, archive, studies):
    """The same without a model of the disk: every process dies at one operation, at once."""
    running, shim = shimmed()
    running.start()
    keeper = Keeper(running)
    scanner = Scanner(running.port, studies[2:4], chance=random.Random(5), ticks=archive.ticks)
    shim.arm(Act.POWER_CUT, at=60)
    scanner.start()
    while not shim.acted:
        assert scanner.is_alive(), "the power was never cut"
        scanner.join(0.05)
    running.kill_children("valkey-server")
    running.kill_children("-m workers")
    running.process.wait(10)
    shim.disarm()
    scanner.join(90)
    promises.wait_until_settled(running, studies[2:4], models=[MODEL])
    keeper.end()
    received = [each.dataset() for each in archive.holds().values()]
    promises.all_kept(running, scanner.acknowledged, received, studies[2:4], models=[MODEL])
    promises.same_bytes(archive.received)
