"""Whatever a destination does, a result is lost to it never and doubled never; the job says what happened."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from pynetdicom import AE

from dicom_node.config import Settings, parse
from dicom_node.ledger import Ledger
from dicom_node.ledger.moving import StoredResult
from dicom_node.lifecycle import State
from dicom_node.services import SEGMENTATION
from dicom_node.spool import Spool
from tests.datasets import EXPLICIT, ct, uid, write
from tests.faults.cutting import CutLine
from tests.unit.test_ledger import claim, inference
from workers.pipeline import Pipeline

STATUSES: dict[int, State] = {
    # PS3.7 Annex C and PS3.4 Table B.2-1: what a delivery is after each
    0x0000: State.DONE,
    0x0001: State.DONE,  # requested optional attributes are not supported
    0x0105: State.FAILED,  # no such attribute
    0x0106: State.FAILED,  # invalid attribute value
    0x0107: State.DONE,  # attribute list error, a warning
    0x0110: State.QUEUED,  # processing failure
    0x0111: State.DONE,  # duplicate SOP instance
    0x0112: State.FAILED,  # no such SOP instance
    0x0113: State.FAILED,  # no such event type
    0x0114: State.FAILED,  # no such argument
    0x0115: State.FAILED,  # invalid argument value
    0x0116: State.DONE,  # attribute value out of range, a warning
    0x0117: State.FAILED,  # invalid SOP instance
    0x0118: State.FAILED,  # no such SOP class
    0x0119: State.FAILED,  # class-instance conflict
    0x0120: State.FAILED,  # missing attribute
    0x0121: State.FAILED,  # missing attribute value
    0x0122: State.FAILED,  # SOP class not supported
    0x0123: State.FAILED,  # no such action type
    0x0124: State.FAILED,  # not authorised
    0x0210: State.QUEUED,  # duplicate invocation
    0x0211: State.QUEUED,  # unrecognised operation
    0x0212: State.QUEUED,  # mistyped argument
    0x0213: State.QUEUED,  # resource limitation
    0xA700: State.QUEUED,  # out of resources
    0xA7FF: State.QUEUED,
    0xA900: State.FAILED,  # data set does not match SOP class
    0xA9FF: State.FAILED,
    0xB000: State.DONE,  # coercion of data elements
    0xB006: State.DONE,  # elements discarded
    0xB007: State.DONE,  # data set does not match SOP class, a warning
    0xB123: State.DONE,  # a warning of the peer's own
    0xC000: State.FAILED,  # cannot understand
    0xC123: State.FAILED,
    0xFE00: State.FAILED,  # cancel: no answer to a C-STORE
}


class Desk:
    """Deliveries of two objects each, done by a real pipeline for a peer at `port`."""

    def __init__(self, folder, port: int, timeout: float, pause: float) -> None:
        self._folder = folder
        self.settings: Settings = parse(
            f"""[node]\nstorage = "storage"
            [delivery]\nconnect_timeout = {timeout}\nresponse_timeout = {timeout}
            first_delay = {pause / 2}\nmaximum_delay = {pause}
            [peer.PACS]\nae_title = "ORTHANC"\nhost = "127.0.0.1"\nport = {port}\nresults = ["seg"]
            """,
            base=folder,
        )
        self.ledger = Ledger(self.settings.ledger_url, migrate=True)
        self.spool = Spool(self.settings.node.storage)
        self.pipeline = Pipeline(self.settings, self.ledger, self.spool, worker="w1")
        self.made = 0

    def delivery(self) -> tuple[int, list[str]]:
        """Make a delivery; return its number and the SOP Instance UIDs of what it sends."""
        self.made += 1
        held = replace(claim(self.ledger, inference(self.ledger, f"1.3.{self.made}")), send_to=("PACS",))
        results = []
        for number in (1, 2):
            dataset = ct(number, study=f"s{self.made}", SOPClassUID=SEGMENTATION)
            content = write(dataset, self._folder / "made.dcm").read_bytes()
            path, sha256 = self.spool.keep_result(str(dataset.SOPInstanceUID), content)
            uids = [str(dataset.SOPInstanceUID), SEGMENTATION, uid("r", self.made), uid("s"), EXPLICIT]
            results.append(StoredResult(*uids, "seg", path, sha256, len(content)))
        (number,) = self.ledger.jobs.inferred(held, results, now=time.time(), seconds={})
        return number, [made.sop_instance_uid for made in results]

    def run(self, number: int) -> State:
        """Try once; return how the job stands."""
        time.sleep(0.03)  # longer than the longest pause
        self.pipeline.run(number)
        return self.ledger.jobs.get(number).state

    def close(self) -> None:
        self.pipeline.close()
        self.ledger.close()


@pytest.fixture
def desk(tmp_path, archive) -> Iterator[Callable[..., Desk]]:
    made = []

    def make(port: int | None = None, timeout: float = 10.0, pause: float = 0.02) -> Desk:
        made.append(Desk(tmp_path, port or archive.port, timeout, pause))
        return made[-1]

    yield make
    for one in made:
        one.close()


def finish(desk: Desk, number: int) -> None:
    """The destination is well again: what waits goes by itself, what was refused when the operator says so."""
    if desk.ledger.jobs.get(number).state is State.FAILED:
        desk.ledger.jobs.requeue(number, now=time.time())
    if desk.ledger.jobs.get(number).state is State.QUEUED:
        assert desk.run(number) is State.DONE


def test_each_status_leads_to_the_state_that_it_means_and_nothing_is_lost_or_changed(desk, archive):
    at = desk()
    for status, expected in STATUSES.items():
        number, uids = at.delivery()
        asked = []

        def second_gets(_event, asked=asked, status=status) -> int:
            asked.append(1)
            return status if len(asked) == 2 else 0x0000

        archive.answer = second_gets
        state = at.run(number)
        job = at.ledger.jobs.get(number)
        assert state is expected, f"0x{status:04X}: {state}, {job.detail}"
        if state is not State.DONE:
            assert f"0x{status:04X}" in (job.detail or ""), "the operator is not told"
        archive.answer = lambda _event: 0x0000
        finish(at, number)
        stored = [each for each in archive.received if each.sop_instance_uid in uids]
        assert {each.sop_instance_uid for each in stored} == set(uids), f"0x{status:04X}"
        assert len({(each.sop_instance_uid, each.content) for each in stored}) == 2, f"0x{status:04X}"


def test_every_one_of_65536_statuses_is_an_answer():
    from dicom_node.services import Verdict, verdict

    meant = {status: verdict(status) for status in range(0x10000)}

    assert {status for status, meaning in meant.items() if meaning is Verdict.STORED} == {
        0x0000,
        0x0001,
        0x0107,
        0x0111,
        0x0116,
        *range(0xB000, 0xC000),
    }


def test_a_destination_that_refuses_for_good_is_said_and_delivered_to_when_the_operator_asks(desk, archive):
    archive.stop()
    archive.start(reject=True)
    at = desk()
    number, uids = at.delivery()

    assert at.run(number) is State.FAILED
    assert "for good" in at.ledger.jobs.get(number).detail
    archive.stop()
    archive.start()
    finish(at, number)

    assert sorted(each.sop_instance_uid for each in archive.received) == sorted(uids)


def test_a_destination_that_is_full_of_associations_is_waited_for(desk, archive):
    archive.stop()
    archive.start(maximum_associations=1)
    other = AE()
    other.add_requested_context(SEGMENTATION, EXPLICIT)
    held = other.associate("127.0.0.1", archive.port, ae_title="ORTHANC")
    at = desk()
    number, uids = at.delivery()

    assert at.run(number) is State.QUEUED
    held.release()
    finish(at, number)

    assert sorted(each.sop_instance_uid for each in archive.received) == sorted(uids)


def test_a_destination_that_hangs_before_or_in_an_association_is_waited_for(desk, archive):
    go_on = threading.Event()

    def hang(_event) -> int:
        go_on.wait(10)
        return 0x0000

    at = desk(timeout=1.5)
    number, uids = at.delivery()
    archive.answer = hang
    assert at.run(number) is State.QUEUED
    assert not go_on.is_set(), "it did not wait for the destination to come round"
    go_on.set()
    archive.answer = lambda _event: 0x0000
    finish(at, number)
    assert archive.holds().keys() == set(uids)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        mute = desk(silent.getsockname()[1], timeout=1.5)
        mute.made = at.made  # both write to one ledger
        number, _ = mute.delivery()
        assert mute.run(number) is State.QUEUED


def test_a_line_that_is_cut_after_any_number_of_bytes_costs_another_try(desk, archive):
    line = CutLine(archive.port, limit=1)
    at = desk(line.port)
    for limit in (1, 60, 200, 400, 700, 1200, 2000):
        archive.received.clear()
        line.limit = limit
        number, uids = at.delivery()
        state = at.run(number)
        assert state in (State.QUEUED, State.DONE), at.ledger.jobs.get(number).detail
        line.limit = 1 << 30
        finish(at, number)
        assert archive.holds().keys() == set(uids)
        assert len({(each.sop_instance_uid, each.content) for each in archive.received}) == 2
    line.close()
    assert line.cuts >= 5


def test_a_destination_that_aborts_in_the_middle_of_an_instance_is_waited_for(desk, archive):
    at = desk()
    number, uids = at.delivery()

    def abort(event) -> int:
        event.assoc.abort()
        return 0x0000

    archive.answer = abort
    with contextlib.suppress(Exception):
        assert at.run(number) is State.QUEUED
    assert at.ledger.jobs.get(number).state is State.QUEUED
    archive.answer = lambda _event: 0x0000
    finish(at, number)
    assert archive.holds().keys() >= set(uids)


def test_a_destination_that_is_not_there_is_waited_for_with_its_results_unchanged(desk, archive):
    archive.stop()
    at = desk()
    number, uids = at.delivery()
    for _ in range(4):
        assert at.run(number) is State.QUEUED
    assert at.ledger.jobs.get(number).reason == "peer_unreachable"
    archive.start()

    finish(at, number)

    assert sorted(each.sop_instance_uid for each in archive.received) == sorted(uids)


def test_a_destination_that_is_not_there_is_tried_for_one_delivery_and_gets_all_when_it_is_back(desk, archive):
    archive.stop()
    at = desk(pause=600.0)
    first, *others = [at.delivery() for _ in range(4)]
    assert at.run(first[0]) is State.QUEUED
    for number, _ in others:
        at.pipeline.run(number)  # a message for it may be under way
        job = at.ledger.jobs.get(number)
        assert (job.state, job.attempts, job.reason) == (State.QUEUED, 0, "peer_unreachable")
        assert job.not_before > time.time() + 100.0
    archive.start()
    at.ledger.jobs.withdraw(first[0], now=time.time())
    at.ledger.jobs.requeue(first[0], now=time.time())

    assert at.run(first[0]) is State.DONE
    for number, _ in others:
        assert at.run(number) is State.DONE

    assert archive.holds().keys() == {uid for _, uids in (first, *others) for uid in uids}
    assert len(archive.received) == 8
