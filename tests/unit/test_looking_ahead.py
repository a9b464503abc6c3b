"""The node says which series will be complete when it has settled, so that somebody may read it meanwhile."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from dicom_node.assembler import Assembler
from dicom_node.config import CompletionTable
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.ledger.arrivals import AssociationEnd
from dicom_node.routing import Priority, Route
from dicom_node.spool import Spool
from tests.unit.test_ledger import ASSOCIATION, instance, receive, record

SERIES = "1.2.3"
ROUTES = [
    Route("screening", {"Modality": "CT"}, ("slow",), ("PACS",), Priority.BACKGROUND),
    Route("stroke", {"Modality": "CT", "calling_ae_title": "SCANNER"}, ("fast",), ("PACS",), Priority.URGENT),
]


class Looking:
    def __init__(self, ledger, folder, routes=ROUTES):
        self.ledger = ledger
        self.foreseen: list[tuple[str, str]] = []
        self.spool = Spool(folder)
        self.assembler = Assembler(
            ledger,
            self.spool,
            completion=CompletionTable(settle=2.0, quiet=20.0),
            routes=routes,
            catalogue={name: SimpleNamespace(digest="d" * 64) for name in ("slow", "fast")},
            foresee=lambda series, model: self.foreseen.append((series, model)),
        )
        self.files = write_series(make_thorax(slices=8, size=(64, 64), noise=0.0, seed=1), folder / "ct")

    def arrive(self, *numbers, now, **header):
        """Have instances come, each on an association of its own that is released."""
        for number in numbers:
            self.put(number)
            receive(self.ledger, number, SERIES, now=now, **header)

    def put(self, number, series=SERIES):
        target = self.spool.absolute(instance(number, series).path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.files[0].read_bytes())


@pytest.fixture
def looking(ledger, tmp_path):
    return Looking(ledger, tmp_path)


def test_a_series_that_only_has_to_settle_is_foreseen_once_for_the_most_urgent_model(looking):
    looking.arrive(1, 2, announced=2, now=100.0)

    looking.assembler.tick(now=100.1)
    looking.assembler.tick(now=100.6)
    looking.assembler.tick(now=103.0)

    assert looking.foreseen == [(SERIES, "fast")]
    assert "series.complete" in [event["name"] for event in looking.ledger.history.events_of(SERIES)]


def test_a_series_of_which_something_is_missing_is_not(looking):
    looking.arrive(1, announced=2, now=100.0)

    looking.assembler.tick(now=100.1)

    assert looking.foreseen == []


def test_a_series_that_is_still_being_sent_is_not(looking):
    looking.arrive(1, announced=2, now=100.0)
    looking.put(2)
    record(looking.ledger, instance(2, SERIES, announced=2), replace(ASSOCIATION, association_id="a9"), now=100.0)

    looking.assembler.tick(now=100.1)
    assert looking.foreseen == []

    looking.ledger.arrivals.associations_ended([AssociationEnd("a9", True, 100.5)])
    looking.assembler.tick(now=100.6)
    assert len(looking.foreseen) == 1


def test_one_that_grows_image_by_image_is_foreseen_when_it_has_doubled(looking):
    for number in range(1, 9):
        looking.arrive(number, now=100.0 + number, **{"sop_class_uid": "1.2.840.10008.5.1.4.1.1.1.1"})
        looking.assembler.tick(now=100.1 + number)

    assert len(looking.foreseen) == 4  # at 1, 2, 4 and 8


def test_what_will_settle_first_is_first(looking):
    for series, now in (("1.2.8", 100.4), ("1.2.9", 100.2)):
        looking.put(1, series)
        receive(looking.ledger, 1, series, now=now, announced=1)

    looking.assembler.tick(now=100.5)

    assert looking.foreseen == [("1.2.9", "fast"), ("1.2.8", "fast")]


def test_what_no_model_is_to_see_is_not(ledger, tmp_path):
    looking = Looking(ledger, tmp_path, [Route("mr", {"Modality": "MR"}, ("fast",), ("PACS",))])
    looking.arrive(1, 2, announced=2, now=100.0)

    looking.assembler.tick(now=100.1)

    assert looking.foreseen == []


def test_what_cannot_be_read_is_said_once_when_it_is_complete(looking):
    looking.arrive(1, 2, announced=2, now=100.0)
    for number in (1, 2):
        looking.spool.absolute(instance(number, SERIES).path).write_bytes(b"no DICOM")

    looking.assembler.tick(now=100.1)
    looking.assembler.tick(now=103.0)

    assert looking.foreseen == []
    assert [event["name"] for event in looking.ledger.history.events_of(SERIES)].count("series.unreadable") == 1


def test_a_series_that_settles_at_once_is_complete_and_not_foreseen(looking):
    looking.arrive(1, 2, announced=2, now=100.0)

    looking.assembler.tick(now=103.0)

    assert looking.foreseen == []
