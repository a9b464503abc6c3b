"""Whatever happens on the way, the same study ends in the same ledger."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicom_node.assembler import Assembler
from dicom_node.config import CompletionTable
from dicom_node.entities import AssociationIdentity
from dicom_node.errors import LedgerUnavailable
from dicom_node.intake import Intake
from dicom_node.ledger import Ledger
from dicom_node.recorder import Ended, Recorder
from dicom_node.routing import Route
from dicom_node.spool import Spool
from tests.datasets import CT, EXPLICIT, ct, dataset_bytes_of, encoded, uid

SLICES = 4
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
NAMES = ("one", "two")
ROUTES = (Route("all", {"Modality": "CT"}, ("model",), ("PACS",)),)
COMPLETION = CompletionTable(settle=2.0, quiet=20.0)
INSTANCES = {(name, number): encoded(ct(number, series=name)) for name in NAMES for number in range(1, SLICES + 1)}


@dataclass(frozen=True)
class Folder:
    digest: str = "d" * 64


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """An empty ledger: migrating one for each example would take longer than all else."""
    path = tmp_path_factory.mktemp("empty") / "ledger.sqlite3"
    Ledger(f"sqlite:///{path}", migrate=True).close()
    return path


@contextmanager
def machine_in_memory(empty: Path) -> Iterator[Machine]:
    """A machine whose disk is memory: a process that dies loses nothing there, and fsync costs nothing."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        shutil.copy(empty, Path(folder) / "ledger.sqlite3")
        machine = Machine(Path(folder))
        try:
            yield machine
        finally:
            machine.ledger.close()


class Crash(Exception):
    """The process died here."""


class Machine:
    """A node without network: what it forgets in a crash is gone, what is on disk stays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1000.0
        self.acknowledged: set[tuple[str, int]] = set()
        self.associations = 0
        self.ledger: Ledger | None = None
        self.boot()

    def boot(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
        self.ledger = Ledger(f"sqlite:///{self.folder / 'ledger.sqlite3'}")
        spool = Spool(self.folder)
        spool.sweep_incoming()
        self.ledger.arrivals.forget_associations_of("node", now=self.now)
        self.recorder = Recorder(self.ledger, spool, node_id="node", clock=lambda: self.now)
        self.recorder.recover()
        self.intake = Intake(spool, self.recorder, clock=lambda: self.now)
        self.assembler = Assembler(
            self.ledger, spool, completion=COMPLETION, routes=ROUTES, catalogue={"model": Folder()}
        )

    def send(self, wanted: list[tuple[str, int]], *, crash: int | None, where: str, released: bool) -> None:
        """Send instances on one association; die at number `crash`: before its group is recorded, in it, or after."""
        self.associations += 1
        identity = AssociationIdentity(f"a{self.associations}", "SCANNER", "NODE", "127.0.0.1")
        try:
            for place, key in enumerate(wanted):
                self.now += 0.01
                self._keep(key, identity)
                self.acknowledged.add(key)
                if place == crash:
                    self._die(where)
                if place % 3 == 0:
                    self.recorder.drain()
            if crash is not None:
                raise Crash
        except Crash:
            self.boot()
            return
        self.recorder.ended(Ended(identity, released, self.now))
        self.recorder.drain()

    def _die(self, where: str) -> None:
        """Die with what was acknowledged in the inbox, with it at its place, or with its rows committed as well."""
        record = self.ledger.arrivals.record

        def dying(*args, **kwargs):
            if where == "after":
                record(*args, **kwargs)
            raise Crash

        self.ledger.arrivals.record = dying
        if where != "inbox":
            self.recorder.drain()
        raise Crash

    def _keep(self, key: tuple[str, int], identity: AssociationIdentity) -> None:
        name, number = key
        self.intake.keep(
            memoryview(INSTANCES[key]),
            transfer_syntax_uid=EXPLICIT,
            affected_sop_class_uid=CT,
            affected_sop_instance_uid=uid("study", name, number),
            association=identity,
        )

    def tick(self, seconds: float) -> None:
        self.recorder.drain()
        self.now += seconds
        self.assembler.tick(now=self.now)


KEYS = sorted(INSTANCES)
SENDINGS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(KEYS), max_size=10),  # with duplicates, in any order
        st.none() | st.integers(0, 9),
        st.sampled_from(["inbox", "before", "after"]),
        st.booleans(),
        st.sampled_from([0.0, 1.0, 3.0, 30.0]),
    ),
    max_size=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sendings=SENDINGS, order=st.permutations(KEYS), split=st.integers(0, len(KEYS)))
def test_any_order_duplicates_splits_and_crashes_end_in_the_same_ledger(empty, sendings, order, split):
    with machine_in_memory(empty) as machine:
        for wanted, crash, where, released, pause in sendings:
            machine.send(wanted, crash=crash, where=where, released=released)
            machine.tick(pause)

        machine.send(order[:split], crash=None, where="before", released=True)
        machine.send(order[split:], crash=None, where="before", released=True)
        machine.tick(30.0)
        machine.tick(30.0)

        check(machine)


def check(machine: Machine) -> None:
    ledger = machine.ledger
    assert machine.acknowledged == set(KEYS)
    assert not ledger.arrivals.open_series()
    for name in NAMES:
        series = uid("study", name)
        instances = ledger.arrivals.instances_of(series)
        assert {i.sop_instance_uid for i in instances} == {uid("study", name, n) for n in range(1, SLICES + 1)}
        (row,) = ledger.history.series_of(series)
        assert row["received"] == SLICES
        jobs = ledger.history.jobs_of(series)
        last = [job for job in jobs if job["revision"] == row["revision"]]
        assert [job["state"] for job in last] == ["queued"], "one job for what is there now"
        assert {job["state"] for job in jobs if job not in last} <= {"cancelled"}
        assert len({job["key"] for job in jobs}) == len(jobs)
        completions = [e for e in ledger.history.events_of(series) if e["name"] == "series.complete"]
        assert len({e["fields"]["revision"] for e in completions}) == len(completions)
    files = {path.name: path for path in (machine.folder / "studies").rglob("*.dcm")}
    assert len(files) == len(KEYS)
    for (name, number), data in INSTANCES.items():
        assert dataset_bytes_of(files[f"{uid('study', name, number)}.dcm"].read_bytes()) == data
    assert not list((machine.folder / "incoming").iterdir())
    assert not any(path.stat().st_size for path in (machine.folder / "arrived").iterdir())


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(1, 6)), st.sets(st.integers(0, 4), max_size=3))
def test_a_ledger_that_is_away_now_and_then_costs_retries_and_nothing_else(empty, order, away):
    with machine_in_memory(empty) as machine:
        identity = AssociationIdentity("a", "SCANNER", "NODE", "127.0.0.1")
        record = machine.ledger.arrivals.record
        keys = [("one", 1), ("one", 2), ("one", 3), ("one", 4), ("two", 1)]

        for place, number in enumerate(order):
            machine._keep(keys[number - 1], identity)
            if place in away:
                machine.ledger.arrivals.record = unavailable
                with pytest.raises(LedgerUnavailable):
                    machine.recorder.drain()
                machine.ledger.arrivals.record = record
            elif place % 2:
                machine.recorder.drain()
        machine.recorder.drain()

        assert machine.ledger.history.counts()["instances"] == 5


def unavailable(*_args, **_kwargs):
    raise LedgerUnavailable
