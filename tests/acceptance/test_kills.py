"""kill -9 of every process at random moments during a stream of studies: nothing lost, nothing doubled."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from io import BytesIO

import pytest
import redis
from pydicom import dcmread
from pynetdicom import AE
from xxhash import xxh3_128_hexdigest

from dicom_node.broker import socket_path
from dicom_node.config import load
from dicom_node.demo.phantom import make_thorax, write_series
from tests.acceptance.stand import storescu, wait_for

pytestmark = [pytest.mark.peer("storescu"), pytest.mark.peer("Orthanc"), pytest.mark.timeout(600)]

STUDIES = 4


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    return [write_series(make_thorax(seed=100 + n), folder / str(n)) for n in range(STUDIES)]


class Sender(threading.Thread):
    """A scanner: sends each study, remembers what was acknowledged, and sends again what was not."""

    def __init__(self, port: int, studies: list) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._studies = studies
        self.acknowledged: set[str] = set()

    def run(self) -> None:
        for files in self._studies:
            left = list(files)
            while left:
                left = self._send(left)
                if left:
                    time.sleep(0.5)

    def _send(self, files: list) -> list:
        entity = AE(ae_title="SCANNER")
        entity.connection_timeout = 2.0
        entity.dimse_timeout = 20.0
        entity.add_requested_context("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1")
        association = entity.associate("127.0.0.1", self._port)
        if not association.is_established:
            return files
        left = []
        for path in files:
            status = None
            with contextlib.suppress(RuntimeError, ValueError):
                status = association.send_c_store(str(path)).get("Status")
            if status == 0x0000:
                self.acknowledged.add(str(dcmread(path, stop_before_pixels=True).SOPInstanceUID))
            else:
                left.append(path)
        if association.is_established:
            association.release()
        return left


def kill_children(running, word: str) -> None:
    for pid in running.children_pids(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def flush(running, word: str) -> None:
    with contextlib.suppress(redis.RedisError):
        redis.Redis(unix_socket_path=str(socket_path(load(running.settings_path)))).flushall()


def kill_node(running, word: str) -> None:
    running.kill()
    time.sleep(0.3)
    running.start()


BLOWS = [
    (kill_children, "--queue infer"),
    (kill_children, "--queue deliver"),
    (kill_children, "-m dicom_node.receiver"),
    (kill_children, "valkey-server"),
    (flush, ""),
    (kill_node, ""),
]


@pytest.mark.parametrize(("seed", "processes"), [(11, 1), (12, 2)])
def test_whatever_is_killed_every_study_gets_its_results_exactly_once(node, orthanc, studies, seed, processes):
    chance = random.Random(seed)
    running = node(pacs_port=orthanc.dicom_port, receive=f"processes = {processes}").start()
    sender = Sender(running.port, studies)

    sender.start()
    blows = [*BLOWS, *chance.choices(BLOWS, k=3)]
    chance.shuffle(blows)
    for blow, word in blows:
        time.sleep(chance.uniform(0.3, 2.5))
        blow(running, word)
    sender.join(120)
    assert not sender.is_alive()

    def settled():
        jobs = running.jobs()
        final = {}
        for job in jobs:
            if job["state"] == "done" and job["kind"] == "deliver":
                final[job["study_instance_uid"]] = max(final.get(job["study_instance_uid"], 0), job["revision"])
        revisions = {row["study_instance_uid"]: row["revision"] for row in running_series(running)}
        return len(revisions) == STUDIES and final == revisions

    try:
        wait_for("every study's last revision to be delivered", settled, seconds=240, every=0.5)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{running.jobs()}\n{running.log()[-6000:]}") from None
    running.wait_until_idle(jobs=2 * STUDIES)

    everything_acknowledged_is_held(running, sender.acknowledged)
    exactly_one_result_set_for_each_final_revision(running, orthanc)


def running_series(running):
    ledger = running.ledger
    try:
        return ledger.history.recent_series(limit=1000)
    finally:
        ledger.close()


def everything_acknowledged_is_held(running, acknowledged: set[str]) -> None:
    ledger = running.ledger
    held = {
        instance.sop_instance_uid: instance
        for row in ledger.history.recent_series(limit=1000)
        for instance in ledger.arrivals.instances_of(row["series_instance_uid"])
    }
    ledger.close()
    assert acknowledged <= held.keys()
    for uid in acknowledged:
        path = running.folder / "storage" / held[uid].path
        content = path.read_bytes()
        length = int.from_bytes(content[140:144], "little")
        assert xxh3_128_hexdigest(content[144 + length :]) == held[uid].digest


def exactly_one_result_set_for_each_final_revision(running, orthanc) -> None:
    delivered = [job for job in running.jobs() if job["kind"] == "deliver" and job["state"] == "done"]
    wanted = Counter(job["study_instance_uid"] for job in delivered)
    for modality in ("SEG", "SR"):
        found = Counter(str(dcmread(BytesIO(content)).StudyInstanceUID) for content in orthanc.files_of(modality))
        assert found == wanted
    finals = Counter((job["study_instance_uid"], job["revision"]) for job in delivered)
    assert set(finals.values()) == {1}


def test_a_broker_that_forgets_everything_delays_a_job_by_a_sweep(node, orthanc, studies):
    running = node(pacs_port=orthanc.dicom_port).start()
    storescu(running.port, *studies[0])
    wait_for("a job", lambda: running.jobs())

    for _ in range(5):
        flush(running, "")
        time.sleep(0.3)
    jobs = running.wait_until_idle(jobs=2)

    assert {job["state"] for job in jobs} == {"done"}
