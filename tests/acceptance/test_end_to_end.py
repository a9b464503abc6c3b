"""A study in by DCMTK, SEG and SR out to a real Orthanc: the main path, whole."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from pydicom import Dataset, dcmread

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.niceness import RECEIVER, WORKER
from tests.acceptance.stand import NodeProcess, OrthancProcess, free_port, may_come_first, storescu, wait_for

pytestmark = [pytest.mark.peer("storescu"), pytest.mark.peer("Orthanc")]

MODELS = ["ct_lung", "ct_lung_nodule"]


@dataclass(frozen=True, slots=True)
class Pushed:
    """A study that went through the node, once; further tests only add to it."""

    node: NodeProcess
    orthanc: OrthancProcess
    files: list[Path]
    sent: CompletedProcess[str]
    jobs: list[dict[str, Any]]

    @property
    def kept(self) -> list[Path]:
        """The results in the node's storage."""
        return sorted((self.node.folder / "storage" / "results").rglob("*.dcm"))

    def arrived(self, modality: str) -> list[Dataset]:
        """The results in the PACS."""
        return [dcmread(BytesIO(content)) for content in self.orthanc.files_of(modality)]


@pytest.fixture(scope="module")
def pushed(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    files = write_series(make_thorax(seed=1), folder / "ct")
    orthanc = OrthancProcess(tool("Orthanc"), folder / "orthanc", dicom_port=free_port(), http_port=free_port())
    node = NodeProcess(folder / "node", pacs_port=orthanc.dicom_port, models=MODELS)
    try:
        orthanc.start()
        sent = storescu(node.start().port, *files)
        yield Pushed(node, orthanc, files, sent, node.wait_until_idle(jobs=4))
    finally:
        node.end()
        orthanc.stop()


def test_a_pushed_chest_ct_comes_back_as_one_seg_and_one_sr_for_each_model(pushed):
    assert pushed.sent.returncode == 0, pushed.sent.stderr
    assert {job["state"] for job in pushed.jobs} == {"done"}
    segs, reports = pushed.arrived("SEG"), pushed.arrived("SR")
    assert len(segs) == len(reports) == 2
    source = dcmread(pushed.files[0])
    for result in (*segs, *reports):
        assert result.StudyInstanceUID == source.StudyInstanceUID
        assert result.PatientID == source.PatientID
        assert result.PatientName == source.PatientName
        assert result.SeriesDescription.startswith("AI ")
    [study] = [study for study in pushed.orthanc.studies()]
    assert study["MainDicomTags"]["StudyInstanceUID"] == source.StudyInstanceUID


def test_the_bytes_at_the_destination_are_the_bytes_that_were_kept(pushed):
    written = {str(dataset.SOPInstanceUID): dataset for dataset in map(dcmread, pushed.kept)}
    arrived = [*pushed.arrived("SEG"), *pushed.arrived("SR")]
    assert len(arrived) == 4
    for dataset in arrived:
        assert dataset == written[str(dataset.SOPInstanceUID)]


def test_status_and_history_speak_to_people_and_to_programs(pushed):
    status = pushed.node.cli("status")
    as_json = pushed.node.cli("status", "--json")

    assert "ct_lung" in status.stdout
    assert json.loads(as_json.stdout)["instances"] == len(pushed.files)
    study = str(dcmread(pushed.files[0]).StudyInstanceUID)
    events = json.loads(pushed.node.cli("history", study, "--json").stdout)["events"]
    assert {"series.opened", "series.complete", "job.queued"} <= {event["name"] for event in events}
    [complete] = [event for event in events if event["name"] == "series.complete"]
    assert f"{len(pushed.files)} slices without a gap, association released" in complete["fields"]["reason"]


def test_the_same_study_pushed_twice_makes_one_set_of_results(pushed):
    again = storescu(pushed.node.port, *pushed.files)
    time.sleep(3)

    assert again.returncode == 0
    assert len(pushed.node.jobs()) == 4
    assert len(pushed.arrived("SEG")) == 2


def test_own_results_that_come_back_start_no_job(pushed):
    returned = pushed.node.cli("send", *map(str, pushed.kept), "--json")
    time.sleep(5)

    assert returned.returncode == 0, returned.stderr + returned.stdout
    assert json.loads(returned.stdout)["stored"] == len(pushed.kept)
    assert len(pushed.node.jobs()) == 4


def test_two_halves_on_two_associations_end_in_one_final_set_that_supersedes(node, orthanc, tmp_path):
    files = write_series(make_thorax(seed=4), tmp_path / "ct")
    half = len(files) // 2
    running = node(pacs_port=orthanc.dicom_port).start()

    storescu(running.port, *files[:half])
    wait_for("the first half to be found complete", lambda: running.jobs(), seconds=20)
    storescu(running.port, *files[half:])
    jobs = running.wait_until_idle(jobs=3)

    final = [job for job in jobs if job["kind"] == "infer" and job["state"] == "done" and job["revision"] == 2]
    assert len(final) == 1
    reports = [dcmread(BytesIO(content)) for content in orthanc.files_of("SR")]
    earlier = [job for job in jobs if job["kind"] == "deliver" and job["state"] == "done" and job["revision"] == 1]
    assert len(reports) == 1 + len(earlier)
    if earlier:
        assert sum("PredecessorDocumentsSequence" in report for report in reports) == 1


def test_a_model_that_does_not_apply_says_why_and_writes_nothing(node, orthanc, tmp_path):
    files = write_series(make_thorax(seed=6), tmp_path / "ct")[:5]
    running = node(pacs_port=orthanc.dicom_port).start()

    storescu(running.port, *files)
    [job] = running.wait_until_idle(jobs=1)

    assert job["state"] == "not_applicable"
    assert job["reason"] == "too_few_slices"
    assert not orthanc.files_of("SEG")
    assert not orthanc.files_of("SR")
    told = running.cli("history", job["study_instance_uid"])
    assert "too_few_slices" in told.stdout


def test_a_destination_that_is_down_gets_its_results_when_it_comes_back(node, orthanc, tmp_path):
    files = write_series(make_thorax(seed=7), tmp_path / "ct")
    orthanc.stop()
    running = node(pacs_port=orthanc.dicom_port).start()
    storescu(running.port, *files)

    def waiting():
        return [job for job in running.jobs() if job["kind"] == "deliver" and job["attempts"] >= 2]

    wait_for("the delivery to be tried twice", waiting, seconds=90)
    assert waiting()[0]["reason"] == "peer_unreachable"
    orthanc.start()
    jobs = running.wait_until_idle(jobs=2)

    assert {job["state"] for job in jobs} == {"done"}
    assert len(orthanc.files_of("SEG")) == len(orthanc.files_of("SR")) == 1


def test_sigterm_ends_the_node_and_all_that_it_started(node, orthanc):
    running = node(pacs_port=orthanc.dicom_port).start()
    wait_for("both workers", lambda: len(running.children_pids("-m workers")) == 2)

    code = running.terminate()

    assert code == 0
    assert running.children_pids("-m workers") == []
    assert running.children_pids("valkey-server") == []


def test_a_series_is_read_while_the_node_waits_to_be_sure_that_it_is_complete(node, orthanc, tmp_path):
    running = node(pacs_port=orthanc.dicom_port, settle=4.0).start()
    wait_for("both workers", lambda: running.log().count("worker.ready") == 2)

    storescu(running.port, *write_series(make_thorax(seed=4), tmp_path / "ct"))
    [job, _] = sorted(running.wait_until_idle(jobs=2), key=lambda job: job["job_id"])

    log = running.log()
    assert log.count("series.foreseen") == 1
    assert log.index("series.foreseen") < log.index("series.complete")
    assert job["state"] == "done"
    assert len(orthanc.files_of("SEG")) == 1


@pytest.mark.skipif(not may_come_first(), reason="it takes CAP_SYS_NICE")
def test_on_a_busy_machine_the_node_comes_before_its_workers(node):
    running = node(pacs_port=free_port()).start()
    wait_for("both workers", lambda: running.log().count("worker.ready") == 2)

    places = {pid: os.getpriority(os.PRIO_PROCESS, pid) for pid in running.children_pids("-m workers")}

    assert os.getpriority(os.PRIO_PROCESS, running.process.pid) == RECEIVER
    assert len(places) == 2
    assert set(places.values()) == {WORKER}
