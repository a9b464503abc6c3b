"""The demonstration waits for what it started, whenever it happens to look."""

from __future__ import annotations

import pytest

from dicom_node.demo.show import follow
from dicom_node.entities import AssociationIdentity, Header, Instance
from dicom_node.ledger.arrivals import AssociationEnd
from dicom_node.ledger.history import History
from dicom_node.lifecycle import Happening, State
from dicom_node.routing import Order

ORDERS = ((Order("ct_lung", ("PACS",), ("chest",)), "d" * 64),)


@pytest.mark.parametrize("orders", [ORDERS, ()], ids=["routed", "unrouted"])
def test_a_series_that_is_complete_while_the_jobs_are_read_is_waited_for(ledger, monkeypatch, capsys, orders):
    receive(ledger)
    happens = [lambda: None, lambda: complete(ledger, orders), lambda: None, lambda: decline(ledger), lambda: None]
    read = ledger.history.recent_jobs

    def read_then_let_happen(*, limit):
        jobs = read(limit=limit)
        if happens:
            happens.pop(0)()
        return jobs

    with monkeypatch.context() as patch:
        patch.setattr(ledger.history, "recent_jobs", read_then_let_happen)
        follow(ledger)

    assert [job["state"] for job in read(limit=10)] == [State.NOT_APPLICABLE] * len(orders)
    said = capsys.readouterr().out
    assert "series complete: test" in said
    assert ("too_few_slices" if orders else "no route for a series") in said


def receive(ledger) -> None:
    header = Header("1.2.840.10008.5.1.4.1.1.2", "1.2.3.1", "1.2", "1.2.3", "CT", 1, None, None, False)
    one = Instance(header, "1.2.840.10008.1.2.1", "p/1.2.3.1", "f" * 64, 1000)
    association = AssociationIdentity("a1", "SCANNER", "DICOM_NODE", "127.0.0.1")
    ledger.arrivals.record([(one, association, 1.0)], node_id="node", now=1.0)
    ledger.arrivals.associations_ended([AssociationEnd("a1", True, 1.0)])


def complete(ledger, orders) -> None:
    (found,) = ledger.arrivals.open_series()
    seen = {"revision": found.revision, "last_activity": found.last_activity}
    assert ledger.jobs.complete("1.2.3", **seen, reason="test", orders=list(orders), now=2.0) is not None


def decline(ledger) -> None:
    for job in History.recent_jobs(ledger.history, limit=10):  # the one that is not patched
        held = ledger.jobs.claim(job["job_id"], worker="w", lease=60.0, now=3.0)
        ledger.jobs.ended(held, Happening.DECLINED, reason="too_few_slices", detail="6", now=4.0)
