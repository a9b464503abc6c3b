"""A worker's line: what is urgent first, three jobs at once on it, one of them at the model; giving way, and alone."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dicom_node.config import parse
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Kind, State
from dicom_node.routing import Order, Priority
from dicom_node.spool import Spool
from tests.unit.test_ledger import complete, names, receive
from workers import choosing, handing, inferring
from workers.containment import walls
from workers.pipeline import Pipeline

contains = pytest.mark.skipif(bool(walls().missing), reason=f"this kernel lacks {walls().missing}")

STUB = """
import time
import numpy as np
from workers.prediction import Prediction

def model(grid, parameters, progress):
    for number in range(int(parameters["windows"])):
        time.sleep(parameters["window_seconds"])
        progress((number + 1) / parameters["windows"])
    labels = np.zeros(grid.shape, np.uint8)
    labels[2:5, 10:30, 10:30] = 1
    return Prediction(labels=labels)
"""
MANIFEST = """
schema = 1
name = "{name}"
version = "1.0.0"
title = "A stub that keeps its device busy"
manufacturer = "A hospital"
licence = "MIT"
intended_use = "tests"
runtime = "{runtime}"
trusted = true
parameters = {{ entry_point = "stub_of_a_device:model", windows = {windows}, window_seconds = 0.1 }}
[inputs.ct]
modality = ["CT"]
[outputs.segments.1]
label = "Lung"
category = {{ value = "123037004", scheme = "SCT", meaning = "Anatomical Structure" }}
type = {{ value = "39607008", scheme = "SCT", meaning = "Lung" }}
colour = [240, 230, 140]
"""
SETTINGS = """
[node]
storage = "storage"
models = "models"
[jobs]
give_way_times = 1
[peer.PACS]
ae_title = "PACS"
host = "127.0.0.1"
port = 1
[[route]]
run = "quick"
send_to = "PACS"
"""
SLICES = 8


WINDOWS = {"quick": 5, "slow": 60, "contained": 60}
"""The stub as an algorithm in the worker, fast and slow, and in a process of its own; how many windows each has."""


def write_stubs(folder, monkeypatch) -> None:
    """Write the stub's package beside `folder`'s models, and the models."""
    package = folder / "packages" / "stub_of_a_device"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(package.parent))
    scope = {}
    exec(STUB, scope)
    for name, windows in WINDOWS.items():
        runtime = "python" if name == "contained" else "algorithm"
        algorithm = SimpleNamespace(
            load=lambda parameters, device: lambda grid, progress: scope["model"](grid, parameters, progress)
        )
        monkeypatch.setitem(sys.modules, f"workers.algorithms.{name}", algorithm)
        (folder / "models" / name).mkdir(parents=True)
        text = MANIFEST.format(name=name, runtime=runtime, windows=windows)
        (folder / "models" / name / "model.toml").write_text(text)


class Line:
    """A worker's pipeline over a ledger and a spool of its own."""

    def __init__(self, folder) -> None:
        self.folder = folder
        settings = parse(SETTINGS, base=folder)
        self.ledger = Ledger(settings.ledger_url, migrate=True)
        self.spool = Spool(settings.node.storage)
        self.pipeline = Pipeline(settings, self.ledger, self.spool, worker="test")
        self.threads: list[threading.Thread] = []
        self.studies = 0

    def study(self, model="quick", priority=Priority.NORMAL) -> int:
        """Receive a small CT; return the number of its job."""
        self.studies += 1
        series = f"1.9.{self.studies}"
        phantom = make_thorax(slices=SLICES, size=(64, 64), spacing=(30.0, 5.0, 5.0), noise=0.0, seed=1)
        paths = write_series(phantom, self.folder / series, study="1.2", series=series)
        return self.received(paths, series, model, priority)

    def received(self, paths, series, model, priority=Priority.NORMAL) -> int:
        """Have files in the spool and in the ledger as a complete series; return the number of its job."""
        for number, path in enumerate(paths, start=1):
            target = self.spool.absolute(f"p/{series}.{number}")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
            receive(self.ledger, number, series)
        (number,) = complete(
            self.ledger, series, orders=[(Order(model, ("PACS",), ("route",), priority), "d" * 64)], now=time.time()
        )
        return number

    def run(self, number) -> None:
        """Let a message come."""
        self.threads.append(threading.Thread(target=self.pipeline.run, args=(number,)))
        self.threads[-1].start()

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        self.pipeline.close()

    def job(self, number):
        return self.ledger.jobs.get(number)

    def span(self, number, stage):
        """When a stage of a job began and ended, out of the ledger."""
        [fields] = [row["fields"] for row in self.ledger.history.events_of_job(number) if row["name"] == "job.finished"]
        return fields["began"][stage], fields["began"][stage] + fields["seconds"][stage]

    def event(self, number, name):
        return [row["at"] for row in self.ledger.history.events_of_job(number) if row["name"] == name]

    def child(self):
        """The process of the contained model."""
        bundles = self.pipeline._inferring._bundles._loaded.values()
        return next(bundle.model.pid for bundle in bundles if bundle.manifest.name == "contained")


@pytest.fixture
def line(tmp_path, monkeypatch):
    write_stubs(tmp_path, monkeypatch)
    made = Line(tmp_path)
    yield made
    made.pipeline.close()
    made.ledger.close()


@pytest.fixture
def at_model(line, eventually):
    """Waits until a job is at the model."""
    return lambda number: eventually(lambda: line.job(number).progress > 0.15, seconds=60)


def test_a_worker_rehearses_its_encoding_beside_the_loading_of_its_models(line, monkeypatch, eventually):
    threads = []
    monkeypatch.setattr(inferring, "created_results", lambda: threads.append(threading.current_thread().name))

    line.pipeline.warm()

    eventually(lambda: threads == ["record"])


def test_a_series_that_was_foreseen_is_not_read_again(line, monkeypatch, eventually):
    reads = []
    read = choosing.load
    monkeypatch.setattr(choosing, "load", lambda paths, slot: reads.append(len(paths)) or read(paths, slot))
    number = line.study()
    line.pipeline.foresee("1.9.1", "quick")
    eventually(lambda: line.pipeline._foresight.is_free() and reads)

    line.run(number)
    line.finish()

    assert reads == [SLICES]
    assert line.job(number).state is State.DONE
    assert line.span(number, "load")[0] > 0


@pytest.mark.parametrize(("series", "model"), [("1.9.1", "../quick"), ("1.9.1", "slow"), ("9.9", "quick")])
def test_what_cannot_be_foreseen_costs_the_job_nothing(line, series, model):
    number = line.study()

    line.pipeline.foresee(series, model)
    line.run(number)
    line.finish()

    assert line.job(number).state is State.DONE


def test_a_worker_with_a_job_at_the_model_foresees_nothing(line, at_model, monkeypatch):
    first = line.study("slow")
    line.run(first)
    at_model(first)
    begun = []
    monkeypatch.setattr(line.pipeline._inferring, "foresee", lambda *series: begun.append(series))

    line.pipeline.foresee("1.9.1", "quick")
    line.pipeline._foresight.is_free()

    assert begun == []


def test_what_is_more_urgent_overtakes_and_among_equals_the_first_is_first(line):
    first, second = line.study(), line.study()
    urgent = line.study(priority=Priority.URGENT)
    last = line.study(priority=Priority.BACKGROUND)

    line.run(last)
    line.finish()

    claimed = sorted((first, second, urgent, last), key=lambda number: line.event(number, "job.claimed")[0])
    assert claimed == [urgent, first, second, last]
    assert {line.job(number).state for number in claimed} == {State.DONE}


def test_reading_the_model_and_recording_of_three_studies_go_on_at_once_and_only_one_is_at_the_model(line):
    numbers = [line.study() for _ in range(4)]

    line.run(numbers[0])
    line.finish()

    models = [line.span(number, "model") for number in numbers]
    for (_, ended), (began, _) in itertools.pairwise(models):
        assert began >= ended
    for following, (_, ended) in zip(numbers[1:], models, strict=False):
        assert line.span(following, "load")[0] < ended
    for number, (began, ended) in zip(numbers, models[1:], strict=False):
        assert line.span(number, "encode")[0] < ended
        assert began < line.event(number, "job.finished")[0]
    assert all(names(line.ledger, number).count("job.claimed") == 1 for number in numbers)
    kinds = [[result.kind for result in line.ledger.jobs.results_of(number)] for number in numbers]
    assert kinds == [kinds[0]] * 4
    assert set(kinds[0]) == {"seg", "sr"}


@contains
def test_a_model_that_runs_gives_way_to_a_more_urgent_job_between_two_windows_and_begins_again(line, at_model):
    screening = line.study("contained", Priority.BACKGROUND)
    line.run(screening)
    at_model(screening)
    child = line.child()
    stroke = line.study(priority=Priority.URGENT)
    line.threads[-1].join(60)
    assert line.child() == child  # it was told to stop, and was not loaded again
    line.finish()

    assert names(line.ledger, screening) == [
        "job.queued", "job.claimed", "job.yielded", "job.claimed", "job.finished",
    ]  # fmt: skip
    assert line.span(stroke, "model")[1] <= line.span(screening, "model")[0]
    assert (line.job(screening).attempts, line.job(screening).yielded) == (1, 1)


def test_a_job_that_has_given_way_often_enough_is_not_interrupted_again(line, at_model):
    screening = line.study("slow", Priority.BACKGROUND)
    line.run(screening)
    at_model(screening)
    line.study(priority=Priority.URGENT)
    deadline = time.time() + 30
    while line.job(screening).yielded == 0 and time.time() < deadline:
        time.sleep(0.05)
    at_model(screening)
    second = line.study(priority=Priority.URGENT)

    line.finish()

    assert names(line.ledger, screening).count("job.yielded") == 1
    assert line.span(second, "model")[0] >= line.span(screening, "model")[1]


def test_neither_of_equals_interrupts_the_other(line, at_model):
    first = line.study("slow")
    line.run(first)
    at_model(first)

    second = line.study()
    line.finish()

    assert "job.yielded" not in names(line.ledger, first)
    assert line.span(second, "model")[0] >= line.span(first, "model")[1]


def test_a_job_that_was_tried_before_is_alone_on_the_line(line):
    suspect, other = line.study(), line.study()
    held = line.ledger.jobs.claim(suspect, worker="that died", lease=60, now=time.time())
    line.ledger.jobs.abandon_worker("that died", maximum_deaths=3, now=time.time())
    assert held.attempts == 1

    line.run(other)
    line.threads[-1].join(60)
    assert line.job(suspect).state is State.QUEUED
    third = line.study()
    line.run(suspect)
    line.threads[-1].join(60)
    line.run(third)
    line.finish()

    spans = {
        number: (line.span(number, "load")[0], line.event(number, "job.finished")[0]) for number in (suspect, third)
    }
    assert spans[suspect][0] >= line.event(other, "job.finished")[0]
    assert spans[third][0] >= spans[suspect][1]


def test_a_worker_that_stops_gives_back_what_it_has_only_read(line, at_model, eventually):
    running, ahead = line.study("slow"), line.study()
    line.run(running)
    at_model(running)
    eventually(lambda: line.job(running).progress > 0.2, seconds=30)
    eventually(lambda: line.job(ahead).state is State.RUNNING, seconds=60)  # read in the last ten seconds of the model

    line.pipeline.stop()
    line.finish()

    assert line.job(running).state is State.DONE
    assert (line.job(ahead).state, line.job(ahead).attempts) == (State.QUEUED, 0)
    assert names(line.ledger, ahead) == ["job.queued", "job.claimed", "job.yielded"]


@contains
def test_a_job_that_is_cancelled_leaves_the_model_between_two_windows_and_its_process_lives_on(line, at_model):
    unwanted = line.study("contained")
    line.run(unwanted)
    at_model(unwanted)
    child = line.child()

    line.ledger.jobs.withdraw(unwanted, now=time.time())
    line.threads[-1].join(20)

    assert not line.threads[-1].is_alive()
    assert line.child() == child
    assert line.ledger.jobs.results_of(unwanted) == []


@contains
def test_what_comes_next_is_written_for_the_model_before_it_is_its_turn(line, at_model, monkeypatch, eventually):
    writers = []
    write = handing.write_grid
    monkeypatch.setattr(
        handing, "write_grid", lambda *what: writers.append(threading.current_thread().name) or write(*what)
    )
    line.pipeline._inferring._bundles.get(line.folder / "models" / "contained")
    jobs = [line.study("contained") for _ in range(2)]
    line.run(jobs[0])
    at_model(jobs[0])

    eventually(lambda: len(writers) == 2)
    for job in jobs:
        line.ledger.jobs.withdraw(job, now=time.time())

    assert "model" not in writers


def test_a_job_that_waited_for_long_stands_among_the_normal_ones_and_never_before_an_urgent_one(line):
    ledger, courtesy = line.ledger, replace(parse(SETTINGS, base=line.folder).jobs.courtesy, seconds=0.5)
    old, now = line.study(priority=Priority.BACKGROUND), time.time()
    normal, urgent = line.study(), line.study(priority=Priority.URGENT)

    def order(later):
        return ledger.queue.due(Kind.INFER, courtesy=courtesy, now=now + later, hint_again=10.0, limit=9)

    soon = order(0.4) if time.time() - now < 0.4 else [urgent, normal, old]
    assert soon == [urgent, normal, old]
    assert order(60.0) == [urgent, old, normal]
