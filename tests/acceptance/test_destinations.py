"""The right kind for each destination: what a peer does not take is replaced, and the ledger says so."""

from __future__ import annotations

import json
from io import BytesIO

import pytest
from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt

from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.services import LABEL_MAP_SEGMENTATION, SEGMENTATION
from tests.acceptance.stand import OrthancProcess, free_port, storescu

pytestmark = pytest.mark.peer("storescu")

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"


@pytest.fixture
def old_orthanc(tmp_path, tool):
    """An Orthanc that takes the SOP classes it knows, which in Debian 12 are older than the label map."""
    process = OrthancProcess(
        tool("Orthanc"), tmp_path / "orthanc", dicom_port=free_port(), http_port=free_port(), takes_unknown=False
    )
    process.start()
    yield process
    process.stop()


@pytest.fixture
def archive():
    """Makes storage SCPs (pynetdicom) that take only the SOP classes they are told to; yields what they receive."""
    servers = []

    def make(*sop_classes: str) -> tuple[int, list]:
        received = []
        entity = AE(ae_title="ORTHANC")
        for sop_class in sop_classes:
            entity.add_supported_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])

        def store(event):
            received.append(event.dataset)
            return 0x0000

        servers.append(entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)]))
        return servers[-1].socket.getsockname()[1], received

    yield make
    for server in servers:
        server.shutdown()


def deliveries(running) -> list[dict]:
    return [job for job in running.jobs() if job["kind"] == "deliver"]


def story(running, study_instance_uid: str) -> str:
    """All that `history` tells a program about a study."""
    told = running.cli("history", study_instance_uid, "--json")
    assert told.returncode == 0, told.stderr
    return told.stdout


def kept(running) -> list:
    return [dcmread(path) for path in (running.folder / "storage" / "results").rglob("*.dcm")]


@pytest.mark.peer("Orthanc")
def test_a_peer_without_label_maps_gets_bits_and_the_ledger_says_so(node, old_orthanc, tmp_path):
    peer = 'segmentation_type = "LABELMAP"\nresults = ["seg", "sr", "gsps", "sc"]'
    running = node(pacs_port=old_orthanc.dicom_port, peer=peer).start()
    first = write_series(make_thorax(seed=1), tmp_path / "first")
    second = write_series(make_thorax(seed=2), tmp_path / "second")

    storescu(running.port, *first)
    running.wait_until_idle(jobs=2)

    [segmentation] = [dcmread(BytesIO(content)) for content in old_orthanc.files_of("SEG")]
    assert segmentation.SOPClassUID == SEGMENTATION
    [report] = [dcmread(BytesIO(content)) for content in old_orthanc.files_of("SR")]
    referred = str(report)
    assert segmentation.SOPInstanceUID in referred
    assert LABEL_MAP_SEGMENTATION not in referred
    assert len(old_orthanc.files_of("PR")) >= 1
    assert "seg: BINARY instead of LABELMAP" in story(running, str(segmentation.StudyInstanceUID))
    assert {str(made.SOPClassUID) for made in kept(running)} >= {SEGMENTATION, LABEL_MAP_SEGMENTATION}

    storescu(running.port, *second)
    running.wait_until_idle(jobs=4)

    of_second = [made for made in kept(running) if made.StudyInstanceUID != segmentation.StudyInstanceUID]
    assert SEGMENTATION in {str(made.SOPClassUID) for made in of_second}
    assert LABEL_MAP_SEGMENTATION not in {str(made.SOPClassUID) for made in of_second}, "the answer is remembered"
    assert "seg: BINARY instead of LABELMAP" in story(running, str(of_second[0].StudyInstanceUID))


@pytest.mark.peer("Orthanc")
def test_a_probe_says_what_a_real_archive_takes(node, old_orthanc):
    running = node(
        pacs_port=old_orthanc.dicom_port, peer='segmentation_type = "LABELMAP"\nresults = ["seg", "sr"]'
    ).start()

    probed = running.cli("peers", "probe", "PACS", "--json")
    shown = running.cli("peers", "probe", "PACS")

    answer = json.loads(probed.stdout)
    accepted = {entry["sop_class_uid"] for entry in answer["accepted"] if entry["accepted"]}
    assert {SEGMENTATION, COMPREHENSIVE_3D_SR, SECONDARY_CAPTURE} <= accepted
    assert LABEL_MAP_SEGMENTATION not in accepted
    assert answer["results"] == {"seg": "Segmentation instead", "sr": "taken"}
    assert probed.returncode == shown.returncode == 1
    assert "Segmentation instead" in shown.stdout


def test_a_peer_that_shows_only_pictures_gets_the_picture(node, archive, tmp_path):
    port, received = archive(SECONDARY_CAPTURE)
    running = node(pacs_port=port, peer='results = ["seg", "sr", "sc"]').start()

    storescu(running.port, *write_series(make_thorax(seed=1), tmp_path / "ct"))
    running.wait_until_idle(jobs=2)

    [picture] = received
    assert picture.SOPClassUID == SECONDARY_CAPTURE
    told = story(running, str(picture.StudyInstanceUID))
    assert "seg: sc instead" in told
    assert "sr: sc instead" in told


def test_a_result_that_nothing_replaces_is_not_lost_in_silence(node, archive, tmp_path):
    port, received = archive(SEGMENTATION)
    running = node(pacs_port=port, peer='results = ["seg", "sr"]').start()

    storescu(running.port, *write_series(make_thorax(seed=1), tmp_path / "ct"))
    running.wait_until_idle(jobs=2)

    [delivery] = deliveries(running)
    assert delivery["state"] == "failed"
    assert "Comprehensive 3D SR" in json.dumps(delivery)
    assert "dicom-node peers probe PACS" in json.dumps(delivery)
    assert received == [], "half a result is no result"
