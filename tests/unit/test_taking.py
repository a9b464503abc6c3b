"""An instance that C takes from the connection to the disk is the one that Python takes, and has the same answer."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from dicom_node import native
from dicom_node.associations import Associations, Opened
from dicom_node.errors import SpoolFull
from dicom_node.intake import Intake
from dicom_node.landing import memory
from dicom_node.pdata import Broken, Inflow, StoreRequest
from dicom_node.sockets import limit_waits
from dicom_node.spool import Spool
from dicom_node.storing import Storing
from tests.datasets import BIG_ENDIAN, CT, DEFLATED, EXPLICIT, IMPLICIT, ct, encoded
from tests.unit.test_pdata import answers, pdu, pdv

if not native.is_there:
    pytest.skip("installed without a C compiler", allow_module_level=True)

STUDY, SERIES = "1.2.3.40000000001", "1.2.3.41"
INSTANCE = f"{SERIES}.1"


class Recorded:
    """Stands in the place of the recorder, and keeps what it is told."""

    def __init__(self) -> None:
        self.arrivals: list = []

    def require_room(self) -> None: ...

    def acknowledging(self):
        return nullcontext()

    def arrived(self, arrival) -> None:
        self.arrivals.append(arrival)


class Receiver:
    """Takes what comes on a connection; notes what C said of each."""

    def __init__(self, folder: Path, association, syntax: str, *, maximum: int = 1 << 30) -> None:
        folder.mkdir()
        self.spool = Spool(folder)
        self.recorded = Recorded()
        self.ended: list = []
        self.reasons: list[int] = []
        self._intake = Intake(self.spool, self.recorded, clock=lambda: 1000.0)  # type: ignore[arg-type]
        self._associations = Associations(SimpleNamespace(), self.ended.append)  # type: ignore[arg-type] - it admits nobody here
        self.opened = Opened(association, object(), 0.0)
        self._maximum, self._syntax = maximum, syntax

    def begin(self, _context: int, request: StoreRequest, room: memoryview) -> Storing:
        begin = partial(
            self._intake.begin,
            affected_sop_class_uid=request.affected_sop_class_uid,
            affected_sop_instance_uid=request.affected_sop_instance_uid,
            transfer_syntax_uid=self._syntax,
            association=self.opened.identity,
            room=room,
            expected=self.opened.latest,
        )
        storing = Storing(self._associations, self.opened, begin, maximum=self._maximum)
        take = storing.take

        def noted(filling):
            taken = take(filling)
            self.reasons.append(taken.reason)
            return taken

        storing.take = noted  # type: ignore[method-assign]
        return storing

    def serve(self, *sent: bytes, is_gone: bool = False) -> list:
        """Return how the requests are answered; a peer that `is_gone` reads no answer."""
        answered = self.answered(*sent, is_gone=is_gone)
        return [
            (int(each.Status), each.get("ErrorComment"), each.MessageIDBeingRespondedTo) for each in answers(answered)
        ]

    def answered(self, *sent: bytes, is_gone: bool = False) -> bytes:
        """Return the answers as they come."""
        ours, theirs = socket.socketpair()
        limit_waits(ours, 5.0)
        with ours, theirs:
            sender = threading.Thread(target=_send, args=(theirs, b"".join(sent), is_gone))
            sender.start()
            if is_gone:
                sender.join()
            inflow = Inflow(ours, longest_pdu=1 << 17, timeout=5.0, begin=self.begin)
            with suppress(Broken):
                inflow.serve(linger=0.05, until=lambda: False)
            inflow.close()
            ours.shutdown(socket.SHUT_RD)
            sender.join()
            ours.shutdown(socket.SHUT_WR)
            answered = b""
            while not is_gone and (piece := theirs.recv(65536)):
                answered += piece
        return answered

    @property
    def files(self) -> list[bytes]:
        """Return what the inbox holds, the names apart."""
        return [path.read_bytes() for path in self.spool.inbox.waiting()]

    @property
    def kept(self) -> list:
        return [(each.header, each.digest, each.size) for each in self.recorded.arrivals]


def _send(connection: socket.socket, content: bytes, is_gone: bool) -> None:
    with suppress(BrokenPipeError):
        connection.sendall(content)
    connection.close() if is_gone else connection.shutdown(socket.SHUT_WR)


def command(sop_class: str, instance: str, number: int) -> bytes:
    """Return a C-STORE-RQ, whatever its names are."""
    elements = [(0x0002, sop_class.encode()), (0x0100, b"\1\0"), (0x0110, struct.pack("<H", number)), (0x0700, b"\0\0")]
    elements += [(0x0800, b"\1\0"), (0x1000, instance.encode())]
    padded = [(element, value + b"\0" * (len(value) % 2)) for element, value in elements]
    body = b"".join(struct.pack("<HHL", 0, element, len(value)) + value for element, value in padded)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def store(data: bytes, *, sop_class: str = CT, instance: str = INSTANCE, number: int = 7, size: int = 1 << 16) -> bytes:
    """Return a C-STORE request and its data set, in fragments of `size`."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    fragments = [pdu(pdv(2 * (piece is pieces[-1]), piece)) for piece in pieces]
    return pdu(pdv(3, command(sop_class, instance, number))) + b"".join(fragments)


def image(number: int = 1, **elements) -> Dataset:
    """Return a slice with short names."""
    made = ct(number, pixel=number, **elements)
    made.SOPInstanceUID, made.SeriesInstanceUID, made.StudyInstanceUID = f"{SERIES}.{number}", SERIES, STUDY
    return made


def renamed(old: str, new: str) -> bytes:
    """Return a data set with one name in the place of another that is as long."""
    before, after = old.encode(), new.encode()
    assert len(before) == len(after)
    assert DATA.count(before) == 1
    return DATA.replace(before, after)


def without(*keywords: str) -> bytes:
    made = image()
    for keyword in keywords:
        delattr(made, keyword)
    return encoded(made)


DATA = encoded(image())
SHORT = without(*(each.keyword for each in image() if not each.keyword.endswith("UID") and each.keyword != "PixelData"))
BIG = image()
BIG.PixelData = bytes(range(256)) * 9000
BIG["PixelData"].VR = "OW"
COMPRESSED = b"\xe0\x7f\x10\x00OB\0\0" + b"\xff" * 4 + b"\xfe\xff\x00\xe0" + bytes(104)
PIXELS = 12 + 512  # bytes of the last element

ORDINARY = {
    "explicit": (DATA, EXPLICIT, {}),
    "implicit": (encoded(image(), IMPLICIT), IMPLICIT, {}),
    "in many fragments": (DATA, EXPLICIT, {"size": 100}),
    "compressed": (DATA[:-PIXELS] + COMPRESSED, EXPLICIT, {}),
    "more after the pixels": (DATA + b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0abcd", EXPLICIT, {}),
    "not said where": (without("ImagePositionPatient", "Modality"), EXPLICIT, {}),
    "a zero that leads": (renamed(f"{SERIES}.1", "1.2.3.04.0"), EXPLICIT, {"instance": "1.2.3.04.0"}),
    "spaces behind": (renamed(f"{SERIES}.1", "1.2.3.4   "), EXPLICIT, {"instance": "1.2.3.4"}),
}
ODD = {
    "no pixels": (without("PixelData"), EXPLICIT, {}),
    "very short": (SHORT[:-PIXELS] + SHORT[-PIXELS:][:8] + bytes(4), EXPLICIT, {}),
    "large": (encoded(BIG), EXPLICIT, {}),
    "big endian": (encoded(image(), BIG_ENDIAN), BIG_ENDIAN, {}),
    "deflated": (encoded(image(), DEFLATED), DEFLATED, {}),
    "another instance": (DATA, EXPLICIT, {"instance": f"{INSTANCE}1"}),
    "another that begins the same": (DATA, EXPLICIT, {"instance": SERIES}),
    "another class": (DATA, EXPLICIT, {"sop_class": SecondaryCaptureImageStorage}),
    "a name that goes on after a zero byte": (DATA, EXPLICIT, {"instance": f"{INSTANCE}\0.1"}),
    "no study": (without("StudyInstanceUID"), EXPLICIT, {}),
    "no name": (without("SOPInstanceUID"), EXPLICIT, {"instance": ""}),
    "a study that leads out of the folder": (renamed(STUDY, "../../../../../.."), EXPLICIT, {}),
    "two dots": (renamed(f"{SERIES}.1", "1.2.3..40."), EXPLICIT, {"instance": "1.2.3..40."}),
    "a dot first": (renamed(f"{SERIES}.1", ".1.2.3.4.1"), EXPLICIT, {"instance": ".1.2.3.4.1"}),
    "a space first": (renamed(f"{SERIES}.1", " 1.2.3.4.1"), EXPLICIT, {"instance": "1.2.3.4.1"}),
    "a letter": (renamed(f"{SERIES}.1", "1.2.3.4a.1"), EXPLICIT, {"instance": "1.2.3.4a.1"}),
    "pixels cut off": (DATA[:-2], EXPLICIT, {}),
    "cut off before the pixels": (DATA[:300], EXPLICIT, {}),
    "no data set": (bytes(range(256)) * 3, EXPLICIT, {}),
    "nothing": (b"", EXPLICIT, {}),
}


def received(folder: Path, association, data, syntax, options) -> Receiver:
    receiver = Receiver(folder, association, syntax)
    receiver.status = receiver.serve(store(data, **options))  # type: ignore[attr-defined]
    return receiver


@pytest.mark.parametrize("name", [*ORDINARY, *ODD])
def test_it_is_answered_kept_and_told_of_as_in_python(name, tmp_path, association, monkeypatch):
    case = {**ORDINARY, **ODD}[name]
    ours = received(tmp_path / "c", association, *case)
    monkeypatch.setattr(native, "_library", None)
    theirs = received(tmp_path / "python", association, *case)

    assert (ours.reasons == [native.LANDED]) is (name in ORDINARY)
    assert ours.status == theirs.status
    assert len(ours.status) == 1
    assert ours.kept == theirs.kept
    assert ours.files == theirs.files
    assert len(ours.files) == len(ours.kept) == (ours.status[0][0] == 0)
    books = [
        (each.opened.stored, each.opened.refused, each.opened.bytes, each.opened.latest) for each in (ours, theirs)
    ]
    assert books[0] == books[1]
    assert not ours.opened.busy


def test_one_after_another_each_has_its_own_name_and_digest(tmp_path, association):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    data = {f"{SERIES}.{number}": encoded(image(number)) for number in range(1, 6)}

    status = receiver.serve(*(store(each, instance=name, number=at) for at, (name, each) in enumerate(data.items())))

    assert status == [(0, None, number) for number in range(5)]
    assert receiver.reasons == [native.LANDED, native.LANDED, native.GONE], (
        "as many at a time as have come before, and one"
    )
    assert [each.header.sop_instance_uid for each in receiver.recorded.arrivals] == list(data)
    for arrival, each in zip(receiver.recorded.arrivals, data.values(), strict=True):
        assert arrival.digest == xxhash.xxh3_128_hexdigest(each)
        content = Path(arrival.path).read_bytes()
        assert content.endswith(bytes.fromhex(arrival.digest) + each)
        assert len(content) == arrival.size


def test_what_became_durable_is_told_of_when_nobody_reads_the_answer(tmp_path, association):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)

    receiver.serve(store(DATA), is_gone=True)

    assert receiver.reasons == [native.GONE]
    assert len(receiver.kept) == len(receiver.files) == receiver.opened.stored == 1


def test_a_file_that_somebody_has_deleted_is_not_acknowledged(tmp_path, association, monkeypatch):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    begin = receiver.begin

    def tidied(*asked):
        storing = begin(*asked)
        for path in receiver.spool.inbox.unfinished():
            path.unlink()
        return storing

    monkeypatch.setattr(receiver, "begin", tidied)
    ((status, _, _),) = receiver.serve(store(DATA))

    assert status == 0xA700
    assert receiver.reasons == [native.WHOLE]
    assert not receiver.kept


@pytest.mark.parametrize("why", ["the watermark is near", "more than an instance may have"])
def test_where_room_is_short_python_decides(why, tmp_path, association, monkeypatch):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT, maximum=1 << 16 if "may" in why else 1 << 30)
    if "near" in why:

        def require_room(size: int = 0) -> None:
            if size > len(DATA):
                raise SpoolFull("near")

        monkeypatch.setattr(receiver.spool, "require_room", require_room)

    assert receiver.serve(store(DATA)) == [(0, None, 7)]
    assert receiver.reasons == [native.PROGRESS]


def test_a_defect_after_it_is_durable_keeps_the_file_for_the_next_start(tmp_path, association, monkeypatch):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    monkeypatch.setattr("dicom_node.intake.header_of", lambda *_: 1 / 0)

    assert receiver.serve(store(DATA)) == [(0, None, 7)]
    assert len(receiver.files) == 1
    assert not receiver.kept


# -- one after another ---------------------------------------------------------------------------------------------


def mixed(names: list[str]) -> list[bytes]:
    """Return requests for cases of `ORDINARY` and `ODD`, in an encoding that all have."""
    cases = {**ORDINARY, **ODD}
    return [store(cases[name][0], number=number, **cases[name][2]) for number, name in enumerate(names, 1)]


EXPLICIT_ONES = [name for name, (_, syntax, _) in {**ORDINARY, **ODD}.items() if syntax == EXPLICIT]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(["explicit", "explicit", *EXPLICIT_ONES]), min_size=2, max_size=12))
def test_whatever_follows_whatever_it_is_taken_as_in_python(names, tmp_path_factory, association):
    folder, sent = tmp_path_factory.mktemp("mixed"), mixed(names)
    ours, theirs = Receiver(folder / "c", association, EXPLICIT), Receiver(folder / "python", association, EXPLICIT)

    answered = ours.answered(*sent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", None)
        assert answered == theirs.answered(*sent)

    assert len(list(answers(answered))) == len(sent)
    assert ours.kept == theirs.kept
    assert sorted(ours.files) == sorted(theirs.files)
    assert all(Path(each.path).stat().st_size == each.size for each in ours.recorded.arrivals)
    assert (ours.opened.stored, ours.opened.refused) == (theirs.opened.stored, theirs.opened.refused)
    assert (ours.opened.bytes, ours.opened.latest) == (theirs.opened.bytes, theirs.opened.latest)
    for receiver in (ours, theirs):
        receiver.spool.inbox.close()
        assert len(list(receiver.spool.inbox.folder.iterdir())) == len(ours.kept), "no slot is lost"
    shutil.rmtree(folder)


SERIES_OF_SIX = [store(DATA, number=number) for number in range(1, 7)]


@pytest.mark.parametrize(
    ("data", "status"),
    [(encoded(BIG), 0), (ODD["very short"][0], 0), (DATA[:-2], 0xC000)],
    ids=["large", "short", "odd"],
)
def test_one_that_is_not_ordinary_after_others_goes_on_in_python(data, status, tmp_path, association):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)

    answered = receiver.serve(*SERIES_OF_SIX, store(data, number=9), store(DATA, number=10))

    assert [number for _, _, number in answered] == [1, 2, 3, 4, 5, 6, 9, 10]
    assert [each for each, _, _ in answered] == [0, 0, 0, 0, 0, 0, status, 0]
    assert len(receiver.kept) == 8 - bool(status)


@pytest.mark.parametrize("at", [3, 100, 270, 275, 280, 900], ids=str)
def test_one_that_comes_slowly_after_others_is_taken_up_where_it_stopped_and_does_not_hold_them(
    at, tmp_path, association
):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    *before, last = SERIES_OF_SIX
    ours, theirs = socket.socketpair()
    limit_waits(ours, 5.0)

    def send() -> None:
        theirs.sendall(b"".join(before) + last[:at])
        time.sleep(1.5)
        assert len(receiver.kept) == 5, "as soon as a second has passed"
        theirs.sendall(last[at:])
        theirs.shutdown(socket.SHUT_WR)

    with ours, theirs, ThreadPoolExecutor() as pool:
        sent = pool.submit(send)
        inflow = Inflow(ours, longest_pdu=1 << 17, timeout=5.0, begin=receiver.begin)
        with suppress(Broken):
            while True:
                inflow.serve(linger=0.05, until=lambda: False)
        sent.result()

    assert len(receiver.kept) == 6
    assert {digest for _, digest, _ in receiver.kept} == {xxhash.xxh3_128_hexdigest(DATA)}


@pytest.mark.parametrize("how_much", [12, 100, 400, 600])
def test_what_came_before_the_peer_went_is_kept_and_nothing_else(how_much, tmp_path, association):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)

    status = receiver.serve(*SERIES_OF_SIX[:5], SERIES_OF_SIX[5][:how_much])

    assert [number for _, _, number in status] == [1, 2, 3, 4, 5]
    assert len(receiver.kept) == len(receiver.files) == receiver.opened.stored == 5
    receiver.spool.inbox.close()
    assert len(list(receiver.spool.inbox.folder.iterdir())) == 5


def test_a_file_that_somebody_has_deleted_does_not_hold_what_follows(tmp_path, association, monkeypatch):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    spare = receiver.spool.inbox.spare

    def tidied(number):
        slots = spare(number)
        for slot in slots[:1]:
            os.unlink(slot.path)
        return slots

    monkeypatch.setattr(receiver.spool.inbox, "spare", tidied)

    assert receiver.serve(*SERIES_OF_SIX) == [(0, None, number) for number in range(1, 7)]
    assert native.WHOLE in receiver.reasons
    assert len(receiver.files) == len(receiver.kept) == 6


def test_what_is_to_be_said_first_is_said_though_the_next_message_is_there(tmp_path, association):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    release = b"\x05\0\0\0\0\4\0\0\0\0"
    ours, theirs = socket.socketpair()
    limit_waits(ours, 5.0)
    with ours, theirs:
        theirs.sendall(b"".join(SERIES_OF_SIX[:3]) + release)
        inflow = Inflow(ours, longest_pdu=1 << 17, timeout=5.0, begin=receiver.begin)
        handed_on = inflow.serve(linger=0.05, until=lambda: len(receiver.kept) == 3)

        assert handed_on + ours.recv(100) == release
    assert len(receiver.kept) == 3


def test_a_name_that_is_none_goes_on_untouched_after_others(tmp_path, association):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    odd = store(DATA).replace(INSTANCE.encode(), INSTANCE[:-1].encode() + b"\xe9", 1)
    ours, theirs = socket.socketpair()
    limit_waits(ours, 5.0)
    with ours, theirs:
        theirs.sendall(b"".join(SERIES_OF_SIX[:5]) + odd)
        inflow = Inflow(ours, longest_pdu=1 << 17, timeout=5.0, begin=receiver.begin)
        handed_on = inflow.serve(linger=0.05, until=lambda: False)

        assert handed_on + ours.recv(1 << 16) == odd
    assert len(receiver.kept) == 5


def test_an_association_that_ended_meanwhile_takes_no_more(tmp_path, association, monkeypatch):
    receiver = Receiver(tmp_path / "c", association, EXPLICIT)
    begin = receiver.begin
    monkeypatch.setattr(receiver, "begin", lambda *asked: None if len(receiver.kept) >= 5 else begin(*asked))

    receiver.serve(*SERIES_OF_SIX[:5], store(encoded(BIG)))

    assert len(receiver.kept) == len(receiver.files) == 5


# -- the digest ------------------------------------------------------------------------------------------------------


def digest(library, content: bytes) -> bytes:
    room = memory()
    room[: len(content)] = content
    into = memory()
    library.dicom_node_digest.argtypes = [native.ctypes.c_void_p, native.ctypes.c_size_t, native.ctypes.c_void_p]
    library.dicom_node_digest.restype = None
    library.dicom_node_digest(native.address(room), len(content), native.address(into))
    return bytes(into[:16])


@pytest.fixture(scope="module")
def without_avx2(tmp_path_factory):
    """The digest as another processor makes it."""
    made = tmp_path_factory.mktemp("plain") / "digest.so"
    source = Path(native.__file__).with_name("digest.c")
    options = ["-O2", "-DDICOM_NODE_PLAIN", "-shared", "-fPIC", "-o", str(made), str(source)]
    subprocess.run([*os.environ.get("CC", "cc").split(), *options], check=True)
    return native.ctypes.CDLL(str(made))


LENGTHS = [241, 242, 255, 256, 257, 1023, 1024, 1025, 1087, 1088, 1089, 2047, 2048, 2049, 65536, 525_312]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_digest_is_that_of_xxhash(length, without_avx2):
    content = struct.pack("<Q", length) * (length // 8) + b"x" * (length % 8)
    expected = xxhash.xxh3_128_digest(content)
    assert digest(native._library, content) == digest(without_avx2, content) == expected


@settings(deadline=None, max_examples=200)
@given(st.binary(min_size=241, max_size=4000))
def test_any_digest_is_that_of_xxhash(content):
    assert digest(native._library, content) == xxhash.xxh3_128_digest(content)
