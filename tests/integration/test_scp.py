from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from io import BytesIO

import pytest
from pydicom import Dataset, dcmread
from pydicom.data import get_testdata_file
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless
from pynetdicom.dimse_primitives import C_STORE

from dicom_node.errors import LedgerUnavailable
from dicom_node.intake import Incoming
from dicom_node.ledger import Ledger
from dicom_node.services import A_ASSOCIATE_RJ, Rejection, Status
from tests.datasets import (
    BIG_ENDIAN,
    CT,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    as_file,
    ct,
    dataset_bytes_of,
    encoded,
    series_of,
    uid,
    write,
)

PRIVATE_SOP_CLASS = "1.3.12.2.1107.5.9.1"


def send(association, dataset, syntax=EXPLICIT):
    return association.send_c_store(as_file(dataset, syntax))


def send_bytes(association, data: bytes, *, sop_class=CT, sop_instance="1.2.3"):
    """Send a C-STORE whose data set is whatever it is."""
    request = C_STORE()
    request.MessageID = 1
    request.Priority = 2
    request.AffectedSOPClassUID = sop_class
    request.AffectedSOPInstanceUID = sop_instance
    request.DataSet = BytesIO(data)
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.001)
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _, answer = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    return answer


def rejection(association) -> tuple[int, int, int]:
    assert association.is_rejected
    primitive = association.acceptor.primitive
    return primitive.result, primitive.result_source, primitive.diagnostic


# -- what is answered -------------------------------------------------------------------------------------


def test_an_echo_is_answered(receiver):
    association = receiver().associate()

    assert association.send_c_echo().Status == 0x0000

    association.release()


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED])
def test_an_instance_is_kept_byte_for_byte(receiver, syntax, either_way):
    node = receiver()
    association = node.associate((CT, syntax))

    answer = send_bytes(association, encoded(ct(), syntax), sop_instance=uid("study", "series", 1))

    association.release()
    assert answer.Status == 0x0000
    (path,) = node.files()
    assert dataset_bytes_of(path.read_bytes()) == encoded(ct(), syntax)
    assert dcmread(path).file_meta.TransferSyntaxUID == syntax


def test_slices_of_one_length_fill_whole_blocks_and_are_kept_byte_for_byte(receiver, either_way):
    node = receiver()
    association = node.associate((CT, EXPLICIT))
    slices = [ct(number) for number in (1, 2, 3)]

    for each in slices:
        send_bytes(association, encoded(each, EXPLICIT), sop_instance=each.SOPInstanceUID)

    association.release()
    files = {dcmread(path).SOPInstanceUID: path.read_bytes() for path in node.files()}
    assert {uid: dataset_bytes_of(file) for uid, file in files.items()} == {
        each.SOPInstanceUID: encoded(each, EXPLICIT) for each in slices
    }
    assert [len(files[each.SOPInstanceUID]) % 4096 == 0 for each in slices] == [False, True, True]


@pytest.mark.parametrize(
    ("name", "syntax"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", JPEGLosslessSV1),
        ("MR_small_RLE.dcm", RLELossless),
        ("MR_small_jp2klossless.dcm", JPEG2000Lossless),
    ],
)
def test_compressed_instances_are_kept_byte_for_byte(receiver, tmp_path, name, syntax):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"this pydicom does not bundle {name}")
    original = dcmread(path)
    assert original.file_meta.TransferSyntaxUID == syntax
    node = receiver("[receive]\nminimum_free_megabytes = 1\nkeep_private_sop_classes = true")
    with open(path, "rb") as file:
        data = dataset_bytes_of(file.read())
    association = node.associate((original.SOPClassUID, syntax))

    answer = send_bytes(association, data, sop_class=original.SOPClassUID, sop_instance=original.SOPInstanceUID)

    association.release()
    assert answer.Status == 0x0000
    assert dataset_bytes_of(node.files()[0].read_bytes()) == data


def test_an_instance_sent_twice_is_answered_twice_and_kept_once(receiver, ledger):
    node = receiver()
    association = node.associate((CT, EXPLICIT))

    statuses = [send(association, ct()).Status for _ in range(2)]

    association.release()
    assert statuses == [0x0000, 0x0000]
    assert len(node.files()) == 1
    assert ledger.history.counts()["instances"] == 1


def test_other_bytes_under_a_known_uid_are_answered_and_set_aside(receiver):
    node = receiver()
    association = node.associate((CT, EXPLICIT))

    statuses = [send(association, ct(pixel=pixel)).Status for pixel in (0, 9)]

    association.release()
    assert statuses == [0x0000, 0x0000]
    assert len(node.files()) == len(node.files("quarantine")) == 1
    assert node.events("instance.quarantined")


def test_below_the_watermark_the_sender_hears_out_of_resources(receiver, ledger):
    node = receiver("[receive]\nminimum_free_megabytes = 1000000000\n")
    association = node.associate((CT, EXPLICIT))

    answer = send(association, ct())

    association.release()
    assert answer.Status == 0xA700
    assert len(answer.ErrorComment) <= 64
    assert ledger.history.counts()["instances"] == 0


def test_what_arrives_while_the_ledger_is_locked_is_recorded_when_it_is_free_again(
    receiver, ledger, tmp_path, monkeypatch, eventually
):
    monkeypatch.setattr("dicom_node.ledger.database._BUSY_TIMEOUT", 0.3)
    node = receiver()
    node.recorder._ledger = impatient = Ledger(f"sqlite:///{tmp_path / 'ledger.sqlite3'}")
    association = node.associate((CT, EXPLICIT))
    other = sqlite3.connect(tmp_path / "ledger.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    first = send(association, ct(1))
    eventually(lambda: node.recorder._is_away)
    monkeypatch.setattr("dicom_node.recorder._BACKLOG", 0)
    second = send(association, ct(2))
    monkeypatch.undo()
    assert len(node.spool.inbox.waiting()) == 1
    other.execute("ROLLBACK")
    other.close()
    third = send(association, ct(2))

    association.release()
    assert (first.Status, second.Status, third.Status) == (0x0000, 0xA700, 0x0000)
    assert len(node.files()) == 2
    assert ledger.history.counts()["instances"] == 2
    impatient.close()


@pytest.mark.parametrize(
    "data", [b"garbage that is no dataset at all" * 9, encoded(ct())[:-100], b"\0" * 4, b"\xff" * 1000],
    ids=["text", "cut off", "four zeros", "ones"],
)  # fmt: skip
def test_data_that_are_no_dataset_cannot_be_understood(receiver, data):
    node = receiver()
    association = node.associate((CT, EXPLICIT))

    answer = send_bytes(association, data, sop_instance=uid("study", "series", 1))

    assert answer.Status == Status.CANNOT_UNDERSTAND == 0xC000
    assert 0 < len(answer.ErrorComment) <= 64
    assert send(association, ct()).Status == 0x0000, "the association survives"
    association.release()


@pytest.mark.parametrize(
    ("command", "tag"),
    [({"sop_instance": "1.2.3"}, 0x00080018), ({"sop_class": "1.2.840.10008.5.1.4.1.1.4"}, 0x00080016)],
)
def test_data_that_contradict_their_command_do_not_match(receiver, command, tag):
    node = receiver()
    association = node.associate((CT, EXPLICIT))

    answer = send_bytes(association, encoded(ct()), **{"sop_instance": uid("study", "series", 1), **command})

    association.release()
    assert answer.Status == 0xA900
    assert answer.OffendingElement == [tag] or answer.OffendingElement == tag
    assert not node.files()


def test_a_defect_of_ours_is_a_processing_failure_and_not_the_end_of_the_association(receiver, monkeypatch):
    node = receiver()

    def defect(*_args, **_kwargs):
        raise KeyError("Zzyzx^Secretive")

    monkeypatch.setattr(node.scp._intake, "begin", defect)
    association = node.associate((CT, EXPLICIT))

    answer = send(association, ct())
    monkeypatch.undo()

    assert answer.Status == 0x0110
    assert "Zzyzx" not in str(answer)
    assert send(association, ct()).Status == 0x0000
    association.release()


# -- who may associate ------------------------------------------------------------------------------------


STRICT = '[receive]\nminimum_free_megabytes = 1\ncheck_called_ae_title = true\ncalling_ae_titles = ["SCANNER"]\n'


def test_a_wrong_called_title_is_rejected_for_good(receiver):
    node = receiver(STRICT)

    association = node.associate(called="OTHER")

    assert rejection(association) == A_ASSOCIATE_RJ[Rejection.CALLED_AE_TITLE] == (1, 1, 7)
    (event,) = node.events("association.rejected")
    assert event["fields"]["called_ae_title"] == "OTHER"


def test_a_wrong_calling_title_is_rejected_for_good(receiver):
    node = receiver(STRICT)

    association = node.associate(calling="STRANGER")

    assert rejection(association) == A_ASSOCIATE_RJ[Rejection.CALLING_AE_TITLE] == (1, 1, 3)
    assert node.associate().is_established


def test_the_limit_in_all_rejects_for_now_and_a_place_that_is_free_again_is_given(receiver, eventually):
    node = receiver("[receive]\nmaximum_associations = 2\n")
    held = [node.associate(calling=f"CT{number}") for number in range(2)]

    assert rejection(node.associate(calling="CT9")) == (2, 3, 2)

    held[0].release()
    eventually(lambda: len(node.scp._associations.listed()) == 1)
    third = node.associate(calling="CT9")
    assert third.is_established
    third.release()
    held[1].release()


def test_the_limit_of_one_peer_leaves_room_for_others(receiver):
    node = receiver("[receive]\nmaximum_associations_per_peer = 1\n")
    first = node.associate(calling="CT1")

    assert rejection(node.associate(calling="CT1")) == (2, 3, 2)
    assert node.associate(calling="CT2").is_established
    first.release()


def test_a_refused_presentation_context_is_an_event(receiver, eventually):
    node = receiver()

    association = node.associate((CT, EXPLICIT), (PRIVATE_SOP_CLASS, EXPLICIT))

    (event,) = eventually(lambda: node.events("presentation_context.refused"))
    association.release()
    assert event["fields"] == {"calling_ae_title": "SCANNER", "sop_classes": [PRIVATE_SOP_CLASS]}


def test_a_private_object_is_kept_when_the_settings_say_so(receiver):
    node = receiver("[receive]\nminimum_free_megabytes = 1\nkeep_private_sop_classes = true\n")
    association = node.associate((PRIVATE_SOP_CLASS, EXPLICIT))
    dataset = ct(SOPClassUID=PRIVATE_SOP_CLASS)

    answer = send(association, dataset)

    association.release()
    assert answer.Status == 0x0000
    assert len(node.files()) == 1


def test_the_next_node_in_the_process_is_strict_again(receiver):
    receiver("[receive]\nkeep_private_sop_classes = true\n")
    node = receiver("[receive]\nkeep_private_sop_classes = false\n")

    association = node.associate((CT, EXPLICIT), (PRIVATE_SOP_CLASS, EXPLICIT))

    assert [context.abstract_syntax for context in association.rejected_contexts] == [PRIVATE_SOP_CLASS]
    association.release()


# -- how an association ends ------------------------------------------------------------------------------


def the_series(node):
    assert node.recorder.flush()
    (series,) = node.ledger.arrivals.open_series()
    return series


def test_a_release_ends_the_hold_and_is_evidence(receiver, eventually):
    node = receiver()
    association = node.associate((CT, EXPLICIT))
    send(association, ct())
    assert the_series(node).held_open

    association.release()

    eventually(lambda: not the_series(node).held_open)
    assert the_series(node).released


def test_a_release_after_a_refusal_is_no_evidence(receiver, eventually):
    node = receiver()
    association = node.associate((CT, EXPLICIT))
    send(association, ct(1))
    assert send_bytes(association, b"garbage", sop_instance=uid("study", "series", 2)).Status != 0x0000

    association.release()

    eventually(lambda: not the_series(node).held_open)
    assert not the_series(node).released


def test_an_abort_ends_the_hold_and_is_no_evidence(receiver, eventually):
    node = receiver()
    association = node.associate((CT, EXPLICIT))
    send(association, ct())

    association.abort()

    eventually(lambda: not the_series(node).held_open)
    assert not the_series(node).released


def test_a_cut_connection_ends_the_hold_and_is_no_evidence(receiver, eventually):
    node = receiver()
    association = node.associate((CT, EXPLICIT))
    send(association, ct())

    association.dul.socket.socket.shutdown(socket.SHUT_RDWR)

    eventually(lambda: not the_series(node).held_open)
    assert not the_series(node).released
    eventually(lambda: not node.scp._associations.listed())


def test_a_connection_cut_while_its_instance_is_stored_holds_nothing_open(receiver, eventually, monkeypatch):
    node = receiver()
    keep, entered, go_on = Incoming.keep, threading.Event(), threading.Event()

    def slow(self, *about):
        entered.set()
        go_on.wait(10)
        return keep(self)

    monkeypatch.setattr(Incoming, "keep", slow)
    association = node.associate((CT, EXPLICIT))
    sender = threading.Thread(target=lambda: send(association, ct()), daemon=True)
    sender.start()
    entered.wait(10)

    association.dul.socket.socket.shutdown(socket.SHUT_RDWR)
    time.sleep(0.3)
    go_on.set()

    eventually(node.ledger.arrivals.open_series)
    eventually(lambda: not the_series(node).held_open)
    assert not the_series(node).released
    sender.join(30)


def test_an_end_that_the_ledger_did_not_hear_of_is_told_later(receiver, eventually, monkeypatch):
    node = receiver()
    association = node.associate((CT, EXPLICIT))
    send(association, ct())
    assert the_series(node).held_open

    def away(*_args, **_kwargs):
        raise LedgerUnavailable

    monkeypatch.setattr(node.ledger.arrivals, "associations_ended", away)
    association.release()
    eventually(lambda: node.recorder._is_away)
    assert node.ledger.arrivals.open_series()[0].held_open
    monkeypatch.undo()

    eventually(lambda: not the_series(node).held_open)
    assert the_series(node).released


def test_nagle_is_off_on_the_accepted_socket(receiver):
    node = receiver()
    association = node.associate()

    (opened,) = node.scp._associations.listed()
    option = opened.association.dul.socket.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    assert option
    association.release()


# -- stopping ---------------------------------------------------------------------------------------------


def test_a_stop_finishes_the_instance_in_flight(receiver, monkeypatch):
    node = receiver()
    keep, entered = Incoming.keep, threading.Event()

    def slow(self, *about):
        entered.set()
        time.sleep(0.5)
        return keep(self)

    monkeypatch.setattr(Incoming, "keep", slow)
    association = node.associate((CT, EXPLICIT))
    answers: list[Dataset] = []
    sender = threading.Thread(target=lambda: answers.append(send(association, ct())))
    sender.start()
    entered.wait(10)

    node.scp.stop()

    sender.join(10)
    assert answers[0].Status == 0x0000
    assert len(node.files()) == 1
    assert not the_series(node).held_open


def test_a_stop_ends_idle_associations_and_leaves_no_thread(receiver, eventually):
    before = threading.active_count()
    node = receiver()
    associations = [node.associate(calling=f"CT{number}") for number in range(10)]
    started = time.monotonic()

    node.stop(grace=10.0)

    assert time.monotonic() - started < 3.0
    eventually(lambda: all(not association.is_established for association in associations))
    eventually(lambda: threading.active_count() <= before, seconds=15)
    assert not node.scp._associations.listed()


def test_nobody_hears_success_for_what_is_not_there_when_the_node_stops_under_load(receiver, eventually):
    node = receiver()
    acknowledged: list[str] = []

    def push(number):
        series = series_of(200, series=f"s{number}")  # first: it takes longer than the association waits, on a bad day
        association = node.associate((CT, EXPLICIT), calling=f"CT{number}", timeout=2)
        for dataset in series:
            if not association.is_established:
                return
            try:
                answer = send(association, dataset)
            except RuntimeError:
                return
            if answer.get("Status") == 0x0000:
                acknowledged.append(str(dataset.SOPInstanceUID))

    senders = [threading.Thread(target=push, args=(number,)) for number in range(4)]
    for sender in senders:
        sender.start()
    eventually(lambda: len(acknowledged) > 20)
    node.scp.stop()
    for sender in senders:
        sender.join(40)

    kept = {path.stem for path in node.files()}
    assert set(acknowledged) <= kept
    assert set(node.ledger.arrivals.held(acknowledged)) == set(acknowledged)
    assert node.recorder.flush()
    assert not any(series.held_open for series in node.ledger.arrivals.open_series())


# -- many at once -----------------------------------------------------------------------------------------


def test_twenty_associations_with_the_same_study_keep_every_instance_once(receiver, ledger, eventually):
    node = receiver()
    statuses: list[int] = []

    def push(number):
        association = node.associate((CT, EXPLICIT), calling=f"CT{number}")
        assert association.is_established
        for dataset in series_of(10):
            statuses.append(send(association, dataset).Status)
        association.release()

    senders = [threading.Thread(target=push, args=(number,)) for number in range(20)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(120)

    assert statuses == [0x0000] * 200
    assert len(node.files()) == ledger.history.counts()["instances"] == 10
    assert not node.files("quarantine")
    eventually(lambda: not the_series(node).held_open)


def test_no_descriptor_is_left_after_many_associations(receiver, eventually):
    node = receiver()
    node.associate().release()
    eventually(lambda: not node.scp._associations.listed())
    time.sleep(0.3)
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(20):
        node.associate().release()

    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 1, seconds=10)


def test_garbage_on_the_port_hurts_nobody(receiver):
    node = receiver()
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\xff\xff\xff\xff", b"\x00" * 1000, b""):
        with socket.create_connection(("127.0.0.1", node.port)) as connection:
            connection.sendall(noise)

    association = node.associate()

    assert association.send_c_echo().Status == 0x0000
    association.release()


# -- DCMTK ------------------------------------------------------------------------------------------------


@pytest.mark.peer("echoscu")
def test_dcmtk_hears_an_echo(receiver, dcmtk):
    node = receiver()

    done = dcmtk("echoscu", "-aec", "DICOM_NODE", "127.0.0.1", node.port)

    assert done.returncode == 0, done.stderr


@pytest.mark.peer("storescu")
def test_dcmtk_sends_a_series_and_the_bytes_are_its_own(receiver, dcmtk, tmp_path, eventually):
    node = receiver()
    paths = [write(dataset, tmp_path / f"{n}.dcm") for n, dataset in enumerate(series_of(8, announced=8))]

    done = dcmtk("storescu", "-xe", "-aet", "SCANNER", "-aec", "DICOM_NODE", "127.0.0.1", node.port, *paths)

    assert done.returncode == 0, done.stderr
    assert len(node.files()) == 8
    sent = {dataset_bytes_of(path.read_bytes()) for path in paths}
    assert {dataset_bytes_of(path.read_bytes()) for path in node.files()} == sent
    eventually(lambda: the_series(node).released)
    assert the_series(node).announced == 8


@pytest.mark.peer("echoscu")
def test_dcmtk_is_told_why_it_is_rejected(receiver, dcmtk):
    node = receiver(STRICT)

    done = dcmtk("echoscu", "-aet", "STRANGER", "-aec", "DICOM_NODE", "127.0.0.1", node.port)

    assert done.returncode != 0
    assert "Calling AE Title Not Recognized" in done.stderr + done.stdout
