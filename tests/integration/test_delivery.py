from __future__ import annotations

import socket
import subprocess
import threading
import time

import pytest
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless
from pynetdicom import AE, evt

from dicom_node.config import DeliveryTable, Peer
from dicom_node.delivery import cstore, pacing
from dicom_node.delivery.cstore import Parcel, contexts_for, deliver, echo
from dicom_node.errors import PeerBusy, PeerRefused, PeerUnreachable
from tests.acceptance.stand import OrthancProcess
from tests.datasets import CT, EXPLICIT, IDENTITY, IMPLICIT, ct, dataset_bytes_of, uid, write

TIMING = DeliveryTable(connect_timeout=2.0, response_timeout=2.0)


class Pacs:
    """A storage SCP that answers as its script says."""

    def __init__(self, *, syntaxes=(EXPLICIT, IMPLICIT), sop_classes=(CT,), answer=lambda event: 0x0000, **options):
        self.received: dict[str, bytes] = {}
        self.syntaxes: list[str] = []
        self.releases = 0
        self.delay: list[int] = []
        self._answer = answer
        self.entity = AE(ae_title="PACS")
        self.entity.add_supported_context("1.2.840.10008.1.1")
        for sop_class in sop_classes:
            self.entity.add_supported_context(sop_class, list(syntaxes))
        for name, value in options.items():
            setattr(self.entity, name, value)
        handlers = [
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_ECHO, self._answer),
            (evt.EVT_RELEASED, self._released),
            (evt.EVT_ACCEPTED, self._accepted),
        ]
        self.server = self.entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.peer = Peer(ae_title="PACS", host="127.0.0.1", port=self.server.socket.getsockname()[1])

    def _store(self, event):
        answer = self._answer(event)
        if answer == 0x0000:
            self.received[str(event.request.AffectedSOPInstanceUID)] = event.request.DataSet.getvalue()
            self.syntaxes.append(str(event.context.transfer_syntax))
        return answer

    def _released(self, _event):
        self.releases += 1

    def _accepted(self, event):
        self.calling = event.assoc.requestor.ae_title


@pytest.fixture
def pacs():
    made = []

    def make(**script) -> Pacs:
        made.append(Pacs(**script))
        return made[-1]

    yield make
    for one in made:
        for association in one.server.active_associations:
            association.abort(block=False)
        one.server.shutdown()


@pytest.fixture
def parcels(tmp_path):
    """Two files to send."""
    made = []
    for number in (1, 2):
        path = write(ct(number), tmp_path / f"{number}.dcm")
        made.append(Parcel(CT, uid("study", "series", number), EXPLICIT, path))
    return made


def to(peer, parcels, **options):
    return deliver(parcels, peer, ae_title="DICOM_NODE", timing=TIMING, **options)


def test_every_file_arrives_unchanged_on_one_association(pacs, parcels, eventually):
    there = pacs()

    statuses = to(there.peer, parcels)

    assert statuses == [(parcel.sop_instance_uid, 0x0000) for parcel in parcels]
    for parcel in parcels:
        assert there.received[parcel.sop_instance_uid] == dataset_bytes_of(parcel.path.read_bytes())
    eventually(lambda: there.releases == 1)
    assert there.calling == "DICOM_NODE"


def test_each_one_that_is_stored_is_reported_at_once(pacs, parcels):
    seen = []

    to(pacs().peer, parcels, sent=lambda parcel, status: seen.append((parcel, status)))

    assert seen == [(parcel, 0x0000) for parcel in parcels]


def test_the_node_can_name_itself_differently_at_one_peer(pacs, parcels):
    there = pacs()

    to(there.peer.model_copy(update={"calling_ae_title": "AI_GATEWAY"}), parcels)

    assert there.calling == "AI_GATEWAY"


@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007, 0x0111])
def test_a_warning_is_a_success_that_is_on_record(pacs, parcels, status):
    there = pacs(answer=lambda event: status)

    assert [answered for _, answered in to(there.peer, parcels)] == [status, status]


@pytest.mark.parametrize("status", [0xA700, 0xA701, 0x0110, 0x0213])
def test_a_status_that_means_later_is_busy(pacs, parcels, status):
    with pytest.raises(PeerBusy, match=f"0x{status:04X}"):
        to(pacs(answer=lambda event: status).peer, parcels)


@pytest.mark.parametrize("status", [0xA900, 0xC000, 0x0117, 0x0122, 0x0124])
def test_a_status_that_means_no_is_refused(pacs, parcels, status):
    with pytest.raises(PeerRefused, match=f"0x{status:04X}"):
        to(pacs(answer=lambda event: status).peer, parcels)


def test_what_the_peer_says_about_a_patient_stays_out_of_the_error(pacs, parcels):
    from pydicom import Dataset

    def tell(_event):
        answer = Dataset()
        answer.Status = 0xC001
        answer.ErrorComment = f"no such patient {IDENTITY['PatientName']}"
        return answer

    with pytest.raises(PeerRefused) as caught:
        to(pacs(answer=tell).peer, parcels)

    assert IDENTITY["PatientName"] not in str(caught.value)


def test_a_rejection_for_good_is_refused(pacs, parcels):
    there = pacs(require_called_aet=True)

    with pytest.raises(PeerRefused, match="Called AE title not recognised"):
        to(there.peer.model_copy(update={"ae_title": "WRONG"}), parcels)


def test_a_rejection_for_now_is_unreachable(pacs, parcels):
    there = pacs(maximum_associations=1)
    other = AE(ae_title="OTHER")
    other.add_requested_context(CT, EXPLICIT)
    held = other.associate("127.0.0.1", there.peer.port)

    with pytest.raises(PeerUnreachable, match="for now"):
        to(there.peer, parcels)

    held.release()


def test_a_peer_that_knows_none_of_the_sop_classes_is_refused(pacs, parcels):
    with pytest.raises(PeerRefused, match="none of the SOP classes"):
        to(pacs(sop_classes=("1.2.840.10008.5.1.4.1.1.4",)).peer, parcels)


def test_a_peer_that_knows_one_class_of_two_is_refused_for_the_other(pacs, parcels, tmp_path):
    other = ct(9, SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    path = write(other, tmp_path / "9.dcm")
    mixed = [parcels[0], Parcel(str(other.SOPClassUID), str(other.SOPInstanceUID), EXPLICIT, path)]
    there = pacs()

    with pytest.raises(PeerRefused, match="no presentation context for SOP Class"):
        to(there.peer, mixed)

    assert len(there.received) == 1


def test_nobody_at_the_port_is_unreachable(parcels, free_port):
    with pytest.raises(PeerUnreachable, match="does not answer"):
        to(Peer(ae_title="PACS", host="127.0.0.1", port=free_port()), parcels)


def test_a_name_that_does_not_resolve_is_unreachable(parcels):
    with pytest.raises(PeerUnreachable):
        to(Peer(ae_title="PACS", host="no-such-host.invalid", port=104), parcels)


def test_a_peer_that_takes_the_connection_and_says_nothing_is_unreachable(parcels):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(PeerUnreachable):
            to(Peer(ae_title="PACS", host="127.0.0.1", port=silent.getsockname()[1]), parcels)

    assert time.monotonic() - started < 8


def test_a_peer_that_hangs_in_the_middle_is_busy(pacs, parcels):
    go_on = threading.Event()

    def hang(_event):
        go_on.wait(20)
        return 0x0000

    started = time.monotonic()
    with pytest.raises(PeerBusy, match="timed out"):
        to(pacs(answer=hang).peer, parcels)
    go_on.set()

    assert time.monotonic() - started < 8


def test_a_peer_that_aborts_in_the_middle_is_busy(pacs, parcels):
    def abort(event):
        event.assoc.abort()
        return 0x0000

    with pytest.raises(PeerBusy):
        to(pacs(answer=abort).peer, parcels)


@pytest.fixture
def large(tmp_path):
    """A file of 12 MB, which is 750 PDUs."""
    image = ct(1)
    image.Rows, image.Columns, image.PixelData = 3000, 2000, bytes(12_000_000)
    return Parcel(CT, str(image.SOPInstanceUID), EXPLICIT, write(image, tmp_path / "large.dcm"))


@pytest.fixture
def associations(monkeypatch):
    """Those that were made to send."""
    made = []
    monkeypatch.setattr(cstore, "pace", lambda association: made.append(association) or pacing.pace(association))
    return made


def test_of_a_large_file_no_more_is_read_than_a_slow_peer_takes(pacs, large, associations):
    waiting = []

    def slow(event):
        waiting.append(associations[0].dul.to_provider_queue.qsize() if associations else 0)
        time.sleep(0.001)

    there = pacs()
    there.server.bind(evt.EVT_PDU_RECV, slow)

    to(there.peer, [large], sent=lambda *_: there.server.unbind(evt.EVT_PDU_RECV, slow))

    assert there.received[large.sop_instance_uid] == dataset_bytes_of(large.path.read_bytes())
    assert len(waiting) > 700
    assert max(waiting) <= 64


@pytest.mark.parametrize("limit", [0, 1 << 24])
def test_no_more_of_a_large_file_is_sent_at_once_whatever_a_peer_would_take(pacs, large, limit):
    lengths = []
    there = pacs(maximum_pdu_size=limit)
    there.server.bind(evt.EVT_DATA_RECV, lambda event: lengths.append(len(event.data)))

    to(there.peer, [large])

    assert there.received[large.sop_instance_uid] == dataset_bytes_of(large.path.read_bytes())
    assert 100_000 < max(lengths) < 140_000


def test_a_peer_that_aborts_in_the_middle_of_a_large_file_is_busy(pacs, large):
    there, seen = pacs(), []

    def abort(event):
        seen.append(event.pdu)
        if len(seen) == 40:
            event.assoc.abort(block=False)

    there.server.bind(evt.EVT_PDU_RECV, abort)
    began = time.monotonic()

    with pytest.raises(PeerBusy):
        to(there.peer, [large])

    assert time.monotonic() - began < 30
    assert not there.received


def test_a_peer_that_drops_the_line_after_the_first_file_has_the_first(pacs, parcels):
    there = pacs()
    seen = []

    def second_is_cut(event):
        if there.received:
            event.assoc.dul.socket.close()
        return 0x0000

    there._answer = second_is_cut

    with pytest.raises(PeerBusy):
        to(there.peer, parcels, sent=lambda parcel, _: seen.append(parcel))

    assert seen == parcels[:1]


def test_a_peer_with_implicit_vr_only_gets_the_same_content_re_encoded(pacs, parcels):
    there = pacs(syntaxes=(IMPLICIT,))

    to(there.peer, parcels)

    assert there.syntaxes == [IMPLICIT, IMPLICIT]
    again = write(ct(1), parcels[0].path.with_suffix(".implicit"), IMPLICIT)
    assert there.received[parcels[0].sop_instance_uid] == dataset_bytes_of(again.read_bytes())


def test_a_compressed_file_is_proposed_as_it_is_and_never_re_encoded(pacs, tmp_path):
    parcel = Parcel(CT, "1.2.3", str(JPEG2000Lossless), tmp_path / "x.dcm")

    assert contexts_for([parcel]) == [(CT, str(JPEG2000Lossless))]
    with pytest.raises(PeerRefused):
        to(pacs().peer, [parcel])


def test_an_echo_is_answered_or_says_why_not(pacs, free_port):
    echo(pacs().peer, ae_title="DICOM_NODE", timing=TIMING)

    with pytest.raises(PeerUnreachable):
        echo(Peer(ae_title="X", host="127.0.0.1", port=free_port()), ae_title="DICOM_NODE", timing=TIMING)


def test_nagle_is_off_on_the_way_out(pacs, parcels, monkeypatch):
    options = []
    setsockopt = socket.socket.setsockopt
    monkeypatch.setattr(
        socket.socket, "setsockopt", lambda self, *a: (options.append(a), setsockopt(self, *a))[1], raising=True
    )

    to(pacs().peer, parcels)

    assert (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1) in options


def test_no_thread_is_left_after_a_delivery(pacs, parcels, eventually):
    there = pacs()
    to(there.peer, parcels)
    eventually(lambda: there.releases == 1)
    before = threading.active_count()

    for _ in range(5):
        to(there.peer, parcels)

    eventually(lambda: threading.active_count() <= before)


# -- real peers -------------------------------------------------------------------------------------------


@pytest.mark.peer("storescp")
@pytest.mark.parametrize("only_implicit", [False, True], ids=["any syntax", "implicit only"])
def test_dcmtk_receives_what_was_sent(parcels, tmp_path, tool, free_port, eventually, only_implicit):
    port, folder = free_port(), tmp_path / "received"
    folder.mkdir()
    options = ["+xi"] if only_implicit else []
    process = subprocess.Popen(
        [tool("storescp"), *options, "-B", "-od", str(folder), "-aet", "PACS", str(port)], stdout=subprocess.DEVNULL
    )
    peer = Peer(ae_title="PACS", host="127.0.0.1", port=port)
    try:
        eventually(lambda: _answers(port))
        to(peer, parcels)
    finally:
        process.terminate()
        process.wait(10)

    received = {dcmread(path).SOPInstanceUID: path for path in folder.iterdir()}
    for parcel in parcels:
        there, here = received[parcel.sop_instance_uid], parcel.path
        assert dcmread(there) == dcmread(here)
        if not only_implicit:
            assert dataset_bytes_of(there.read_bytes()) == dataset_bytes_of(here.read_bytes())


@pytest.fixture
def orthanc(tmp_path, tool, free_port):
    """Debian's Orthanc, empty."""
    process = OrthancProcess(tool("Orthanc"), tmp_path / "orthanc", dicom_port=free_port(), http_port=free_port())
    process.start()
    yield process
    process.stop()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


@pytest.mark.peer("Orthanc")
def test_orthanc_holds_the_bytes_that_were_sent(parcels, orthanc):
    peer = Peer(ae_title="ORTHANC", host="127.0.0.1", port=orthanc.dicom_port)
    echo(peer, ae_title="DICOM_NODE", timing=TIMING)

    statuses = to(peer, parcels) + to(peer, parcels)

    assert {status for _, status in statuses} <= {0x0000, 0x0111, 0xB000}
    files = [orthanc.file(name) for name in orthanc.get("/instances")]
    assert sorted(map(dataset_bytes_of, files)) == sorted(dataset_bytes_of(p.path.read_bytes()) for p in parcels)
