"""Where the time went, told from the ledger."""

from __future__ import annotations

import math

import pytest

from dicom_node.assembler import Assembler
from dicom_node.config import CompletionTable
from dicom_node.lifecycle import Happening
from dicom_node.spool import Spool
from dicom_node.timing import stages
from tests.unit.test_ledger import claim, inference, receive, result
from workers.stopwatch import Stopwatch


def test_every_second_from_the_last_image_to_the_stored_result_is_in_one_stage(ledger):
    held = claim(ledger, inference(ledger), now=20.0)  # received at 1, complete at 10
    to_pacs, to_archive = ledger.jobs.inferred(held, [result()], now=30.0, seconds={"load": 2.0, "model": 7.0})
    sent = claim(ledger, to_pacs, now=31.0)
    ledger.jobs.ended(sent, Happening.FINISHED, now=34.0, seconds={"associate": 0.5, "send": 2.0})

    told = stages(ledger.history.jobs_of("1.2"), ledger.history.events_of("1.2"))

    assert [(stage.peer, stage.name, stage.seconds) for stage in told] == [
        (None, "settle", 9.0),
        (None, "claim", 10.0),
        (None, "load", 2.0),
        (None, "model", 7.0),
        (None, "other", 1.0),
        ("PACS", "claim", 1.0),
        ("PACS", "associate", 0.5),
        ("PACS", "send", 2.0),
        ("PACS", "other", 0.5),
    ]
    assert sum(stage.seconds for stage in told) == 34.0 - 1.0
    assert sum(stage.share for stage in told) == pytest.approx(1.0)
    assert ledger.jobs.get(to_archive).state == "queued"


def test_a_job_that_has_not_ended_has_no_stages(ledger):
    claim(ledger, inference(ledger))

    assert stages(ledger.history.jobs_of("1.2"), ledger.history.events_of("1.2")) == []


def test_the_next_stage_ends_the_one_before_and_one_that_comes_again_adds_up():
    watch = Stopwatch()

    watch.begin("send")
    watch.begin("commit")
    watch.begin("send")
    watch.end()
    watch.end()

    assert list(watch.seconds) == list(watch.began) == ["send", "commit"]


def test_the_assembler_knows_when_a_series_can_be_complete_and_reads_it_no_sooner(ledger, tmp_path):
    reads = []
    completion = CompletionTable(settle=2.0, quiet=20.0)
    assembler = Assembler(ledger, Spool(tmp_path), completion=completion, routes=[], catalogue={})
    instances_of = ledger.arrivals.instances_of
    ledger.arrivals.instances_of = lambda uid: reads.append(uid) or instances_of(uid)
    assert assembler.due == math.inf
    receive(ledger, announced=2, now=100.0)  # one is missing: only silence counts

    assembler.tick(now=100.5)
    assert (assembler.due, reads) == (102.0, [])

    assembler.tick(now=102.0)
    assembler.tick(now=110.0)
    assert (assembler.due, reads) == (120.0, ["1.2.3"])

    receive(ledger, 2, announced=2, now=111.0)
    assembler.tick(now=113.0)
    assert assembler.due == math.inf
    assert ledger.history.events_of("1.2.3")[-2]["name"] == "series.complete"
