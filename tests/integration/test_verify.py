"""`dicom-node verify` on a spool that was received over the network and then damaged for real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.cli.console import console
from dicom_node.inspection import Inspection
from dicom_node.ledger.moving import StoredResult
from dicom_node.routing import Order
from tests.datasets import CT, EXPLICIT, as_file, series_of, uid

LONG_AGO = time.time() - 7200.0
SLICES = 5


@pytest.fixture(autouse=True)
def as_in_the_node(monkeypatch):
    """The command line sets it: images of patients are nobody else's. The tests' own process keeps its priority."""
    before = os.umask(0o027)
    monkeypatch.setattr(os, "nice", lambda _: None)
    yield
    os.umask(before)


@pytest.fixture
def node(receiver, tmp_path, ledger):
    """A receiver with a study and a result in it, and a settings file that leads to them."""
    made = receiver()
    made.send = lambda study: send(made, study)
    made.send("study")
    (tmp_path / "node.toml").write_text(
        f'[node]\nstorage = "storage"\nledger = "sqlite:///{tmp_path / "ledger.sqlite3"}"\n'
    )
    made.settings_path = tmp_path / "node.toml"
    made.result = a_result(made)
    return made


def send(node, study: str) -> None:
    association = node.associate((CT, EXPLICIT))
    assert {association.send_c_store(as_file(each)).Status for each in series_of(SLICES, study=study)} == {0x0000}
    association.release()
    assert node.recorder.flush()


def a_result(node) -> str:
    assert node.recorder.flush()
    (series,) = node.ledger.arrivals.open_series()
    while series.held_open:
        time.sleep(0.02)
        (series,) = node.ledger.arrivals.open_series()
    (number,) = node.ledger.jobs.complete(
        series.series_instance_uid, revision=1, last_activity=series.last_activity, reason="test",
        orders=[(Order("ct_lung", ("PACS",), ("chest",)), "d" * 64)], now=time.time(),
    )  # fmt: skip
    held = node.ledger.jobs.claim(number, worker="w", lease=60, now=time.time())
    path, sha256 = node.spool.keep_result("2.25.4711", b"a whole file")
    seg = "1.2.840.10008.5.1.4.1.1.66.4"
    stored = StoredResult("2.25.4711", seg, "2.25.1", uid("study"), EXPLICIT, "seg", path, sha256, 12)
    node.ledger.jobs.inferred(held, [stored], now=time.time(), seconds={})
    return path


def verify(node, *arguments: str) -> tuple[int, list[tuple[str, str]]]:
    """Run the command; return its exit code, and each fault with the file it is about."""
    ran = CliRunner().invoke(app, ["verify", "--json", "-s", str(node.settings_path), *arguments])
    assert ran.stderr == ""
    return ran.exit_code, faults(ran.stdout)


def faults(output: str) -> list[tuple[str, str]]:
    return sorted((each["fault"], each["path"]) for each in json.loads(output)["problems"])


def found(node, study: str | None = None, **options) -> list[tuple[str, str]]:
    inspection = Inspection(node.ledger, node.spool.storage, **options)
    return sorted((problem.fault.value, problem.path) for problem in inspection.problems(study))


def path_of(node, number: int) -> str:
    name = uid("study", "series", number)
    return f"studies/{uid('study')}/{uid('study', 'series')}/{name}.dcm"


def aged(path):
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def test_every_kind_of_damage_is_found_and_named_and_nothing_else(node):
    assert verify(node) == (0, [])
    storage = node.spool.storage
    flipped, truncated, deleted, empty = (storage / path_of(node, number) for number in range(1, 5))
    content = bytearray(flipped.read_bytes())
    content[-100] ^= 0x01
    flipped.write_bytes(content)
    os.truncate(truncated, truncated.stat().st_size - 1)
    deleted.unlink()
    os.truncate(empty, 0)
    result = storage / node.result
    result.write_bytes(b"another file")
    stray = aged(storage / path_of(node, 5)).with_name("1.2.3.stray.dcm")
    stray.write_bytes(b"x")
    aged(stray)
    note = storage / "results" / "note.txt"
    note.write_text("x")
    aged(note)
    temporary = storage / "incoming" / "abandoned"
    temporary.write_bytes(b"half")
    aged(temporary)
    command = [sys.executable, "-m", "dicom_node", "verify", "--json", "-s", str(node.settings_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert (ran.returncode, ran.stderr) == (1, "")
    expected = [
        ("altered", flipped), ("altered", truncated), ("altered", empty), ("altered", result), ("missing", deleted),
        ("unknown", stray), ("unknown", note), ("temporary", temporary),
    ]  # fmt: skip
    assert faults(ran.stdout) == sorted((fault, str(path.relative_to(storage))) for fault, path in expected)


def test_a_flipped_byte_anywhere_in_data_set_or_identifying_meta_information_is_found(node):
    path = node.spool.storage / path_of(node, 1)
    whole = path.read_bytes()
    start = 144 + int.from_bytes(whole[140:144], "little")
    named = [whole.index(each.encode()) + 3 for each in (EXPLICIT, uid("study", "series", 1))]
    for position in (128, 141, *named, start, start + 1, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 0x04
        path.write_bytes(damaged)
        assert found(node) == [("altered", path_of(node, 1))], position
    path.write_bytes(whole)
    assert found(node) == []


def test_a_file_that_others_can_read_and_one_that_nobody_can_are_found(node):
    open_to_all, broken = (node.spool.storage / path_of(node, number) for number in (1, 2))
    open_to_all.chmod(0o644)
    broken.unlink()
    broken.mkdir()  # root reads everything but a folder

    assert found(node) == [("exposed", path_of(node, 1)), ("unreadable", path_of(node, 2))]


def test_what_is_set_aside_is_read_too(node):
    association = node.associate((CT, EXPLICIT))
    association.send_c_store(as_file(series_of(1, study="study", pixel=9)[0]))
    association.release()
    assert node.recorder.flush()
    (aside,) = (node.spool.storage / "quarantine").iterdir()
    assert found(node) == []

    os.truncate(aside, aside.stat().st_size - 2)

    assert found(node) == [("altered", f"quarantine/{aside.name}")]


def test_one_study_is_verified_alone(node):
    node.send("other")
    (node.spool.storage / path_of(node, 1)).unlink()

    assert verify(node, "--study", uid("other")) == (0, [])
    assert verify(node, "--study", uid("study")) == (1, [("missing", path_of(node, 1))])


def test_what_is_on_its_way_is_no_problem(node):
    young = node.spool.storage / "studies" / "1.2" / "1.2.3" / "1.2.3.4.dcm"
    young.parent.mkdir(parents=True)
    young.write_bytes(b"its row comes in a moment")
    (node.spool.storage / "incoming" / "arriving").write_bytes(b"half")

    assert found(node) == []
    assert [fault for fault, _ in found(node, grace=0.0)] == ["temporary", "unknown"]


def test_what_is_deleted_while_it_is_read_is_no_problem(node):
    """The page of the ledger has been read, then the study goes: rows and files."""
    from dicom_node.retention import Ground

    inspection = Inspection(node.ledger, node.spool.storage)
    items = list(node.ledger.inventory.items())
    inspection._ledger.inventory.items = lambda _study: iter(items)
    node.ledger.departures.delete(
        uid("study"), "d1", node_id="node", judge=lambda _: Ground.AGE, set_aside=lambda *_: None, now=1.0
    )
    for item in items:
        (node.spool.storage / item.path).unlink()

    assert list(inspection.problems()) == []


def test_a_node_that_receives_meanwhile_is_found_sound(node):
    stop = threading.Event()
    sent = []

    def sending():
        while not stop.is_set():
            sent.append(node.send(f"study {len(sent)}"))

    thread = threading.Thread(target=sending)
    thread.start()
    try:
        answers = [found(node, grace=5.0) for _ in range(5)]
    finally:
        stop.set()
        thread.join()

    assert answers == [[]] * 5
    assert sent


def test_the_table_says_what_to_do(node, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)
    (node.spool.storage / path_of(node, 1)).unlink()

    ran = CliRunner().invoke(app, ["verify", "-s", str(node.settings_path)])

    assert ran.exit_code == 1
    assert "restore it from a backup" in ran.stdout
    assert "6 files read: 1 problems" in ran.stdout
