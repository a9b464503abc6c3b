"""What processes that receive for one node have together: places for associations, an inbox in parts, one ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from dicom_node import tally
from dicom_node.config import parse
from dicom_node.entities import AssociationIdentity
from dicom_node.errors import SettingsError
from dicom_node.identity import identity_of_part
from dicom_node.intake import Intake
from dicom_node.ledger import Ledger
from dicom_node.places import Places, SharedPlaces, places_of
from dicom_node.recorder import Recorder
from dicom_node.spool import Spool
from dicom_node.supervision import Child
from tests.datasets import EXPLICIT, ct, dataset_bytes_of, encoded, uid

ASSOCIATION = AssociationIdentity("association-1", "SCANNER", "DICOM_NODE", "127.0.0.1")


class Process:
    """What one of the processes has, in this one."""

    def __init__(self, ledger: Ledger, storage, *, part: int, parts: int = 2) -> None:
        self.spool = Spool(storage, part=part, parts=parts)
        self.recorder = Recorder(ledger, self.spool, node_id=identity_of_part("node", part) if part else "node")
        self.intake = Intake(self.spool, self.recorder)

    def take(self, dataset) -> None:
        self.intake.keep(
            memoryview(encoded(dataset, EXPLICIT)),
            transfer_syntax_uid=EXPLICIT,
            affected_sop_class_uid=str(dataset.SOPClassUID),
            affected_sop_instance_uid=str(dataset.SOPInstanceUID),
            association=ASSOCIATION,
        )


@pytest.fixture
def process(ledger, tmp_path):
    made = []

    def make(part: int, parts: int = 2) -> Process:
        made.append(Process(ledger, tmp_path / "storage", part=part, parts=parts))
        return made[-1]

    yield make
    for each in made:
        each.spool.disown()


# -- places ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path):
    return [SharedPlaces(tmp_path / "associations", parts=3, part=part, most=4) for part in range(3)]


def test_each_sees_what_all_have_taken(rows):
    rows[0].take("CT1")
    rows[1].take("CT1")
    rows[2].take("")
    assert [each.number() for each in rows] == [3, 3, 3]
    assert [rows[2].number(title) for title in ("CT1", "", "CT")] == [2, 1, 0]
    rows[1].give_back("CT1")
    assert (rows[0].number("CT1"), rows[0].number()) == (1, 2)


def test_a_place_that_was_given_back_is_taken_again(rows):
    for _ in range(4):
        rows[1].take("A" * 16)
    rows[1].give_back("A" * 16)
    rows[1].take("B")
    assert (rows[0].number("A" * 16), rows[0].number("B")) == (3, 1)


def test_what_a_dead_process_had_is_cleared_and_nothing_else(rows):
    for row in rows:
        row.take("CT1")
    rows[0].clear(2)
    assert rows[1].number() == 2
    rows[0].clear()
    assert rows[1].number() == 0


def test_one_at_a_time_looks_and_takes_even_among_processes(rows, tmp_path):
    other = f"""
import sys
from pathlib import Path
from dicom_node.places import SharedPlaces
places = SharedPlaces(Path({str(tmp_path / "associations")!r}), parts=3, part=2, most=4)
print("ready", flush=True)
with places:
    print(places.number(), flush=True)
    places.take("OTHER")
"""
    with rows[0]:
        process = subprocess.Popen([sys.executable, "-c", other], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        rows[0].take("MINE")
    with process:
        assert process.stdout.readline() == "1\n", "it has waited"
    with rows[0]:
        assert rows[0].number() == 2


def test_a_file_that_somebody_has_mapped_never_becomes_shorter(tmp_path):
    large = SharedPlaces(tmp_path / "associations", parts=4, part=3, most=100)
    SharedPlaces(tmp_path / "associations", parts=2, part=0, most=1)
    large.take("CT1")  # else this ends the process
    assert large.number() == 1


def test_a_node_with_one_process_shares_nothing(tmp_path):
    settings = parse('[node]\nstorage = "storage"', base=tmp_path)
    places = places_of(settings)
    assert type(places) is Places
    with places:
        places.take("CT1")
        places.take("CT2")
    places.give_back("CT2")
    assert (places.number(), places.number("CT1"), places.number("CT2")) == (1, 1, 0)
    assert not list(tmp_path.iterdir())


# -- inbox ----------------------------------------------------------------------------------------------------------


def test_each_process_finds_what_is_its_own_and_the_node_what_is_nobodys(process):
    for part in range(4):
        process(part, parts=4).take(ct(part + 1))
    found = {part: len(process(part, parts=2).spool.inbox.waiting()) for part in range(2)}
    assert found == {0: 1 + 2, 1: 1}
    node = process(0, parts=2)
    assert node.spool.inbox.taken_up() == [2, 3]
    assert node.recorder.recover() == 3
    node.recorder.drain()
    assert node.spool.inbox.waiting() == []
    assert len(process(1, parts=2).spool.inbox.waiting()) == 1


def test_a_part_belongs_to_one_process_at_a_time_and_the_node_waits_for_it(process, descriptors, tmp_path):
    first, second, node = process(1), process(1), process(0)
    first.spool.inbox.own()
    before = descriptors(tmp_path)
    for other in (second, node):
        with pytest.raises(SettingsError, match=r"still receives into .*arrived/1"):
            other.spool.inbox.own(patience=0.1)
    assert descriptors(tmp_path) == before
    threading.Timer(0.2, first.spool.disown).start()
    node.spool.inbox.own()
    second.spool.inbox.own(patience=0.1)


def test_what_another_process_has_acknowledged_is_waited_for(process):
    mine, other = process(0), process(1)
    other.take(ct(1))
    assert not mine.recorder.flush(timeout=0.2)
    threading.Timer(0.2, other.recorder.drain).start()
    assert mine.recorder.flush(timeout=10.0)
    assert other.recorder.flush(timeout=0.2), "and what lies in its own was just recorded"


def test_what_cannot_be_recorded_is_not_waited_for_for_ever(process):
    mine, other = process(1), process(0)
    other.take(ct(1))
    (path,) = other.spool.inbox.waiting()
    os.utime(path, (time.time() - 120,) * 2)
    assert mine.recorder.flush(timeout=0.2)


def test_two_that_bring_other_bytes_under_one_uid_take_turns(process, ledger, monkeypatch):
    first, second = process(0), process(1)
    first.take(ct(1, pixel=1))
    second.take(ct(1, pixel=2))
    is_between, go_on = threading.Event(), threading.Event()
    settle = first.spool.settle

    def slowly(places) -> None:
        is_between.set()  # it has asked what the ledger holds
        assert go_on.wait(10)
        settle(places)

    monkeypatch.setattr(first.spool, "settle", slowly)
    threads = [threading.Thread(target=each.recorder.drain) for each in (first, second)]
    threads[0].start()
    assert is_between.wait(10)
    threads[1].start()
    threads[1].join(0.5)
    assert threads[1].is_alive(), "it waits"
    go_on.set()
    for thread in threads:
        thread.join(10)

    (instance,) = ledger.arrivals.instances_of(uid("study", "series"))
    assert dataset_bytes_of(first.spool.absolute(instance.path).read_bytes()) == encoded(ct(1, pixel=1))
    (aside,) = (first.spool.storage / "quarantine").iterdir()
    assert dataset_bytes_of(aside.read_bytes()) == encoded(ct(1, pixel=2))


# -- names and numbers ----------------------------------------------------------------------------------------------


def test_a_process_has_a_name_of_its_own_that_the_ledger_can_hold():
    longest = "m" * 40 + ":DICOM_NODE_LONG_:65535"
    names = [identity_of_part(name, part) for name in ("node", longest[:64], longest[:63] + "x") for part in (1, 63)]
    assert names[0] == "node#1"
    assert len(set(names)) == 6
    assert max(map(len, names)) <= 64


def test_what_a_child_counts_the_node_counts(capfd):
    before = tally.events().get(("store.refused", "0xA700"), 0)
    line = {"event": "store.refused", "status": "0xA700", "reason": "words", "calling_ae_title": "CT1"}
    child = (
        "import os; from dicom_node import tally\n"
        "tally.count_elsewhere(lambda line: os.write(1, line.encode()))\n"
        f"tally.count({line!r}); tally.count({{'event': 'of.no.interest'}}); tally.count({line!r})"
    )
    got: list[bytes] = []
    is_over = threading.Event()

    def take(line: bytes) -> None:
        got.append(line)
        tally.count_line(line)
        if len(got) == 2:
            is_over.set()

    process = Child("counts", lambda: [sys.executable, "-c", child], on_line=take)
    process.start().wait(60)
    assert is_over.wait(10)
    assert json.loads(got[0]) == {"event": "store.refused", "status": "0xA700"}, "and nothing else leaves it"
    assert tally.events()["store.refused", "0xA700"] - before == 2
    assert "0xA700" not in capfd.readouterr().out
    tally.count_line(b"what some library prints\n")
