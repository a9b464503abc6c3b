"""Retention on a real node: what goes, what stays, and what a crash between ledger and files leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from pynetdicom import AE

from dicom_node.commitment import Reference, Request
from dicom_node.config import parse
from dicom_node.errors import SettingsError
from dicom_node.ledger import Ledger
from dicom_node.ledger.moving import StoredResult
from dicom_node.lifecycle import Happening, Kind
from dicom_node.node import Node
from dicom_node.spool import Spool
from tests.datasets import CT, EXPLICIT, as_file, series_of, uid

DAY = 86400.0
SETTINGS = """
[node]
host = "127.0.0.1"
port = 0
storage = "storage"
broker = "redis://127.0.0.1:1/0"
[receive]
minimum_free_megabytes = 0
[completion]
settle = 0
quiet = 0
[retention]
{retention}
[peer.PACS]
ae_title = "PACS"
host = "127.0.0.1"
port = 104
[[route]]
run = "ct_lung"
send_to = "PACS"
"""


class Running:
    """A node with a clock that a test moves, and the work that its workers would do."""

    def __init__(self, folder, retention: str) -> None:
        self.folder = folder
        (folder / "node.toml").write_text(SETTINGS.format(retention=retention))
        self.settings = parse((folder / "node.toml").read_text(), base=folder)
        self.storage = self.settings.node.storage
        self.start()

    def start(self) -> None:
        self.node = Node(self.settings)
        self.port = self.node.start()
        self.ledger: Ledger = self.node.ledger

    def restart(self) -> None:
        self.node.stop()
        self.start()

    def send(self, study: str, slices: int = 3) -> str:
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(CT, EXPLICIT)
        association = entity.associate("127.0.0.1", self.port)
        statuses = {association.send_c_store(as_file(each)).Status for each in series_of(slices, study=study)}
        association.release()
        assert statuses == {0x0000}
        return uid(study)

    def finish(self, study_uid: str, *, deliver: bool = True) -> None:
        """Complete the study, infer and deliver."""
        spool, jobs = Spool(self.storage), self.ledger.jobs
        for _ in range(200):
            self.node.tick(now=time.time())
            if inferences := [row for row in self.ledger.history.jobs_of(study_uid) if row["kind"] == Kind.INFER]:
                break
            time.sleep(0.02)
        (row,) = inferences
        held = jobs.claim(row["job_id"], worker="w", lease=60, now=time.time())
        result_uid = uid(study_uid, "seg", time.time())
        path, sha256 = spool.keep_result(result_uid, b"result of " + study_uid.encode())
        series_uid, seg = uid(study_uid, "results"), "1.2.840.10008.5.1.4.1.1.66.4"
        stored = StoredResult(result_uid, seg, series_uid, study_uid, EXPLICIT, "seg", path, sha256, 10)
        (delivery,) = jobs.inferred(held, [stored], now=time.time(), seconds={})
        if deliver:
            held = jobs.claim(delivery, worker="w", lease=60, now=time.time())
            jobs.ended(held, Happening.FINISHED, now=time.time())

    def later(self, days: float) -> None:
        """Let the node look at what is due, so many days from now."""
        self.node.tick(now=time.time() + days * DAY)

    def files(self, folder: str = "") -> list[str]:
        return sorted(str(p.relative_to(self.storage)) for p in (self.storage / folder).rglob("*.dcm"))

    def studies(self) -> set[str]:
        return {row["study_instance_uid"] for row in self.ledger.history.recent_series(limit=1000)}

    def every_row_has_its_file(self) -> bool:
        paths = [row["path"] for row in self.ledger.history.results(limit=1000)]
        for row in self.ledger.history.recent_series(limit=1000):
            paths += [each.path for each in self.ledger.arrivals.instances_of(row["series_instance_uid"])]
        return sorted(paths) == self.files()


@pytest.fixture
def running(tmp_path):
    made: list[Running] = []

    def make(retention: str) -> Running:
        made.append(Running(tmp_path, retention))
        return made[-1]

    yield make
    for one in made:
        one.node.stop()


def audited(node: Running) -> list[tuple[str, str]]:
    """What the audit trail says of deletions: the study and why."""
    lines = [line for line in node.ledger.history.audit(limit=1000) if line["name"] == "audit.dicom_study_deleted"]
    return [(line["study_instance_uid"], line["fields"]["why"]) for line in lines]


def test_a_delivered_study_goes_when_its_days_are_over_with_rows_files_and_a_line_in_the_history(running):
    node = running("days = 30")
    old = node.send("old")
    node.finish(old)

    node.later(29)
    assert (node.studies(), len(node.files())) == ({old}, 4)
    node.later(31)

    assert (node.studies(), node.files()) == (set(), [])
    assert not list((node.storage / "studies").iterdir())
    assert not list((node.storage / "departing").iterdir())
    deleted = node.ledger.history.events_of(old)[-1]
    assert (deleted["name"], deleted["fields"]["instances"], deleted["fields"]["results"]) == ("study.deleted", 3, 1)
    assert audited(node) == [(old, "older than retention.days")]


def test_by_default_nothing_ever_goes(running):
    node = running("")
    node.finish(node.send("old"))

    node.later(10_000)

    assert len(node.files()) == 4


def test_what_is_undelivered_failed_or_promised_stays(running):
    node = running("days = 1")
    undelivered, failed, promised = node.send("undelivered"), node.send("failed"), node.send("promised")
    node.finish(undelivered, deliver=False)
    node.finish(failed, deliver=False)
    (delivery,) = [row for row in node.ledger.history.jobs_of(failed) if row["kind"] == Kind.DELIVER]
    held = node.ledger.jobs.claim(delivery["job_id"], worker="w", lease=60, now=1e12)
    node.ledger.jobs.ended(held, Happening.REFUSED, now=1.0)
    node.finish(promised)
    series_uid = uid("promised", "series")
    references = tuple(Reference(CT, each.sop_instance_uid) for each in node.ledger.arrivals.instances_of(series_uid))
    number = node.ledger.commitments.asked(Request("9.9", references), calling_ae_title="SCANNER", not_before=0, now=0)
    (due,) = node.ledger.commitments.due(now=1e12, limit=10)
    pending = node.ledger.commitments.pending(due)
    assert pending.request_id == number
    assert len(node.node._promising.verdict(pending).committed) == 3

    node.later(1000)
    assert node.studies() == {undelivered, failed, promised}

    node.ledger.jobs.withdraw(delivery["job_id"], now=1.0)  # the operator has seen it
    node.later(1001)
    assert node.studies() == {undelivered, promised}
    assert node.every_row_has_its_file()


def test_a_study_that_is_sent_again_after_its_deletion_is_received_and_worked_on_as_a_new_one(running):
    node = running("days = 1")
    first = node.send("study")
    node.finish(first)
    node.later(2)
    assert node.files() == []

    node.send("study")
    node.finish(first)

    assert len(node.files()) == 4
    assert node.every_row_has_its_file()


def test_a_full_disk_lets_the_oldest_finished_studies_go_until_there_is_room(running, monkeypatch):
    node = running("free_megabytes = 500")
    for number in range(4):
        node.finish(node.send(f"study {number}"))
    waiting = node.send("waiting")
    node.finish(waiting, deliver=False)
    usage = namedtuple("usage", "total used free")
    disk_usage, files = shutil.disk_usage, len(node.files())

    def small_disk(_path):
        free = 500 - 60 + 10 * (files - len(node.files()))  # each file is 10 MB: two studies have to go
        return usage(0, 0, free * 1024 * 1024)

    monkeypatch.setattr(shutil, "disk_usage", small_disk)
    node.later(0.02)
    assert len(node.studies()) == 5, "within the hour nothing goes"
    node.later(0.1)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)

    assert node.studies() == {uid("study 2"), uid("study 3"), waiting}
    deleted = [row for row in node.ledger.history.recent_events(limit=1000) if row["name"] == "study.deleted"]
    assert [row["study_instance_uid"] for row in deleted] == [uid("study 0"), uid("study 1")]
    assert {row["fields"]["ground"] for row in deleted} == {"free space"}


def test_a_wish_for_room_below_the_watermark_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"retention\.free_megabytes"):
        parse("[retention]\nfree_megabytes = 1024", base=tmp_path)
    parse("[retention]\nfree_megabytes = 2000", base=tmp_path)


DIE = """
import os, sys, time
from pathlib import Path
from dicom_node import disposal
from dicom_node.audit import Audit
from dicom_node.config import load
from dicom_node.disposal import Disposal
from dicom_node.ledger import Ledger
from dicom_node.spool import Spool
settings = load(Path(sys.argv[1]))
where, number = sys.argv[2].split()
calls = 0
def dies(original):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(number):
            os._exit(9)
        return original(*arguments, **options)
    return call
module, name = where.split(":")
target = {"disposal": disposal, "os": os, "shutil": disposal.shutil}[module]
setattr(target, name, dies(getattr(target, name)))
ledger = Ledger(settings.ledger_url)
now = time.time() + 40 * 86400
Disposal(settings, ledger, Spool(settings.node.storage), Audit(settings, ledger), node_id=sys.argv[3]).tick(now=now)
"""


@pytest.mark.parametrize(
    ("where", "is_gone"),
    [
        ("os:rename 2", False),  # rows deleted, not committed; some files moved
        ("disposal:_sync 3", False),  # all moved
        ("shutil:rmtree 1", True),  # committed, no file deleted
        ("os:rmdir 3", True),  # some files deleted
    ],
)
def test_a_crash_anywhere_leaves_the_whole_study_or_none_of_it(running, where, is_gone):
    node = running("days = 30")
    first, young = node.send("first"), node.send("young")
    node.finish(first)
    node.finish(young, deliver=False)
    before = node.files()
    arguments = [str(node.folder / "node.toml"), where, node.node.node_id]

    died = subprocess.run([sys.executable, "-c", DIE, *arguments], capture_output=True, text=True, timeout=60)
    assert died.returncode == 9, died.stderr
    node.restart()

    assert node.studies() == ({young} if is_gone else {first, young})
    assert node.every_row_has_its_file()
    assert not list(node.storage.glob("departing/*"))
    assert {study for study, _ in audited(node)} == ({first} if is_gone else set()), "no deletion is silent"
    if is_gone:
        assert len(node.files()) == len(before) - 4
    else:
        assert node.files() == before
        node.later(31)
        assert node.studies() == {young}


def test_what_arrives_for_a_study_that_is_going_this_moment_is_kept(running):
    """The file of a late instance is there, its row not yet: neither the move nor the deletion takes it along."""
    node = running("days = 30")
    study = node.send("study")
    node.finish(study)
    series = node.storage / "studies" / study / uid("study", "series")
    late = series / "1.2.3.late.dcm"
    late.write_bytes(b"acknowledged in a moment")

    node.later(31)

    assert node.studies() == set()
    assert late.read_bytes() == b"acknowledged in a moment"
    assert node.files() == [str(late.relative_to(node.storage))]


def test_a_study_in_another_storage_is_not_touched(running):
    node = running("days = 30")
    study = node.send("study")
    node.finish(study)
    (node.storage / "studies").rename(node.storage / "elsewhere")
    (node.storage / "results").rename(node.storage / "elsewhere results")

    node.later(31)

    assert node.studies() == {study}
    assert not [row for row in node.ledger.history.events_of(study) if row["name"] == "study.deleted"]


def test_old_files_of_the_quarantine_go_and_the_ledger_says_how_many(running):
    node = running("quarantine_days = 7")
    for name, age in (("old", 8), ("young", 6)):
        path = node.storage / "quarantine" / f"{name}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age * DAY,) * 2)

    node.later(0)

    assert node.files("quarantine") == ["quarantine/young.dcm"]
    assert [row["fields"] for row in node.ledger.history.recent_events(limit=9) if row["name"] == "quarantine.deleted"]
