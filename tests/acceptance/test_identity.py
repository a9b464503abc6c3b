"""A patient with a recognisable name, number and birthday goes through the whole node and leaves no trace but images.

Kept as they came: `studies/`, `quarantine/`. Clinical objects: `results/`. Everything else is searched: logs, every
byte of the ledger, messages in the broker, file names, processes and their environments, metrics, what the commands
print, and every Error Comment on the wire.
"""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence
from pydicom.uid import UID
from pynetdicom import AE, AllStoragePresentationContexts, evt

from dicom_node.commitment import STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.dispatch import QUEUES
from dicom_node.lifecycle import Kind
from tests.acceptance.stand import NodeProcess, free_port, wait_for
from tests.datasets import CT, EXPLICIT, ct, encoded
from tests.fuzz.encoding import STORE, Connection, command, message, status_of, store_rq

NAME = "ZZYZXQ^GEHEIMRAT"
GREEK, CYRILLIC, KANJI, LATIN = "Ζυζξκ^Κρυφός", "Жызхк^Тайный", "秘密^患者", "Zyzxöß^Gehüm"
LOOKED_FOR = (
    *("ZZYZXQ", "GEHEIMRAT", "Ζυζξκ", "Κρυφός", "Жызхк", "Тайный", "秘密", "患者", "Zyzxöß", "Gehüm"),
    *("PAT4711SECRET", "OTHER815SECRET", "ACC0815SECRET", "19010203", "1901-02-03", "19870605", "1987-06-05"),
    *("SANKTGEHEIM", "GEHEIMGASSE", "DRVERRAT", "KOMMENTARGEHEIM", "PRIVATGEHEIM", "TEL4242SECRET", "VERDACHTGEHEIM"),
)
ENCODINGS = ("utf-8", "latin-1", "iso8859_7", "iso8859_5", "iso2022_jp", "utf-16-le", "utf-16-be")
HERE = "127.0.0.1"


def variants(text: str) -> Iterator[bytes]:
    """Yield the bytes that a text may be in: each character set, escaped as JSON does, in lower case."""
    for one in dict.fromkeys((text, text.lower(), text.capitalize())):
        for encoding in ENCODINGS:
            try:
                yield one.encode(encoding).strip(b"\x1b$B(") if encoding == "iso2022_jp" else one.encode(encoding)
            except UnicodeEncodeError:
                continue
        yield json.dumps(one)[1:-1].encode()
        yield one.encode().hex().encode()


NEEDLES = {needle: text for text in LOOKED_FOR for needle in variants(text) if len(needle) > 3}


def found(content: bytes | str) -> set[str]:
    """Return what of the patient is in some bytes."""
    content = content.encode() if isinstance(content, str) else content
    return {text for needle, text in NEEDLES.items() if needle in content}


def identified(image: Dataset, *, name: str = NAME, charset: str | list[str] = "ISO_IR 192") -> Dataset:
    """Give an image everything that says who it is of, also where it does not belong."""
    image.SpecificCharacterSet = charset
    image.PatientName, image.PatientID, image.PatientBirthDate = name, "PAT4711SECRET", "19010203"
    image.PatientComments, image.PatientAddress = "KOMMENTARGEHEIM", "GEHEIMGASSE 1"
    image.PatientTelephoneNumbers, image.PatientMotherBirthName = "TEL4242SECRET", name
    image.AccessionNumber, image.StudyDate, image.StudyID = "ACC0815SECRET", "19870605", "PAT4711SECRET"
    image.ReferringPhysicianName = image.OperatorsName = image.PhysiciansOfRecord = "DRVERRAT^A"
    image.InstitutionName, image.InstitutionAddress = "SANKTGEHEIM", "GEHEIMGASSE 2"
    image.StudyDescription, image.SeriesDescription = "VERDACHTGEHEIM", f"{name} VERDACHTGEHEIM"
    image.ImageComments, image.ProtocolName = "KOMMENTARGEHEIM", "VERDACHTGEHEIM"
    other = Dataset()
    other.PatientID, other.PatientName, other.IssuerOfPatientID = "OTHER815SECRET", name, "SANKTGEHEIM"
    deeper = Dataset()
    deeper.RequestedProcedureDescription, deeper.ReasonForTheRequestedProcedure = "VERDACHTGEHEIM", name
    deeper.ReferencedPatientSequence = Sequence([other])
    image.OtherPatientIDsSequence, image.RequestAttributesSequence = Sequence([other]), Sequence([deeper])
    block = image.private_block(0x0011, "PRIVATGEHEIM", create=True)
    block.add_new(0x01, "PN", name)
    block.add_new(0x02, "UN", name.encode())
    return image


class Peer:
    """A PACS that stores, or one that refuses and says of whom."""

    def __init__(self, title: str, *, status: int = 0x0000) -> None:
        self.port, self.received = free_port(), 0
        entity = AE(ae_title=title)
        entity.supported_contexts = AllStoragePresentationContexts
        entity.add_supported_context("1.2.840.10008.1.1")

        def answer(event: evt.Event) -> Dataset | int:
            self.received += 1
            said = Dataset()
            said.Status, said.ErrorComment = status, f"{NAME} born 19010203 PAT4711SECRET is not known here"
            return said if status else 0x0000

        self._server = entity.start_server((HERE, self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, answer)])

    def end(self) -> None:
        self._server.shutdown()


class Listener:
    """Every command that the broker gets, as it comes in."""

    def __init__(self, path: Path) -> None:
        self.said = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._socket.sendall(b"MONITOR\r\n")
        threading.Thread(target=self._listen, daemon=True).start()
        wait_for("the broker to be listened to", lambda: self.said.startswith(b"+OK"), seconds=10)

    def _listen(self) -> None:
        with self._socket:
            while piece := self._socket.recv(1 << 16):
                self.said += piece


@pytest.fixture
def peers():
    made = [Peer("PACS"), Peer("QUOTER", status=0xA900)]
    yield made
    for peer in made:
        peer.end()


@pytest.fixture
def running(tmp_path, tool, peers):
    """A node with TLS, metrics, two routes and two peers, told to log more."""
    certificate = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [tool("openssl"), "req", *certificate, "-keyout", "key.pem", "-out", "node.pem"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    node = NodeProcess(tmp_path / "node", pacs_port=peers[0].port, quiet=2.0)
    node.tls_port, node.web_port = free_port(), free_port()
    text = node.settings_path.read_text().replace('send_to = "PACS"', 'send_to = ["PACS", "QUOTER"]')
    text = text.replace('ae_title = "ORTHANC"', 'ae_title = "PACS"').replace(
        "maximum_attempts = 10", "maximum_attempts = 2"
    )
    node.settings_path.write_text(
        f"""{text}
[[route]]
name = "anything described"
when = {{ SeriesDescription = ".+" }}
run = ["ct_lung_nodule"]
send_to = "PACS"
[peer.QUOTER]
ae_title = "QUOTER"
host = "{HERE}"
port = {peers[1].port}
[tls]
port = {node.tls_port}
certificate = "{tmp_path}/node.pem"
key = "{tmp_path}/key.pem"
client_certificates = "none"
[web]
port = {node.web_port}
"""
    )
    node.verbose = True
    node.start()
    yield node
    node.end()


def send_over_tls(port: int, images: list[Dataset]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    entity = AE(ae_title="SCANNER")
    entity.add_requested_context(CT, EXPLICIT)
    association = entity.associate(HERE, port, tls_args=(context, "localhost"))
    assert association.is_established
    for image in images:
        assert association.send_c_store(image).Status == 0x0000
    association.release()


def said_to_hostile(port: int) -> bytes:
    """Send what is refused, with the patient wherever a text can be; return every response, as it came."""
    good = identified(ct(1, study="refused"))
    instance = str(good.SOPInstanceUID)
    tries = [
        (instance, encoded(good)[:-100]),
        (instance, encoded(good).replace(b"\x10\x00\x10\x00PN", b"\x10\x00\x10\x00SQ")),
        (instance, b"\x10\x00\x10\x00PN\xff\xff" + NAME.encode() * 3),
        (NAME, encoded(good)),
        (instance, encoded(good).replace(instance.encode(), NAME.ljust(len(instance), ".").encode())),
        (
            instance,
            encoded(good).replace(
                good.SeriesInstanceUID.encode(), NAME.ljust(len(good.SeriesInstanceUID), "/").encode()
            ),
        ),
        (
            instance,
            encoded(good).replace(good.StudyInstanceUID.encode(), b"../" * (len(good.StudyInstanceUID) // 3) + b"."),
        ),
    ]
    answers = b""
    with Connection(port) as connection:
        connection.associate(calling="SCANNER")
        for number, (affected, data) in enumerate(tries, start=1):
            connection.send(message(STORE, command(*store_rq(affected, number=number)), data))
            answer = connection.pdu()
            assert status_of(answer) not in (None, 0x0000), (number, answer)
            answers += answer.replace(affected.encode(), b"")  # what the sender calls it is said back (PS3.7 9.3.1.2)
    return answers


def ask_to_commit(port: int) -> str:
    """Ask for commitment of instances named after the patient; return what was answered."""
    entity = AE(ae_title="SCANNER")
    entity.add_requested_context(STORAGE_COMMITMENT, EXPLICIT)
    association = entity.associate(HERE, port)
    asked, item = Dataset(), Dataset()
    item.add_new(0x00081150, "UI", CT)
    item.add_new(0x00081155, "LO", NAME)
    asked.add_new(0x00081195, "LO", "1.2.3.4")
    asked.ReferencedSOPSequence = Sequence([item])
    answer, _ = association.send_n_action(asked, 1, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE)
    association.release()
    return str(answer)


def places(node: NodeProcess) -> Iterator[tuple[str, bytes]]:
    """Yield whatever the node has written or shown outside of images, with where that is."""
    storage = node.folder / "storage"
    yield "log", (node.folder / "log").read_bytes()
    for path in sorted(storage.rglob("*")):
        inside = path.relative_to(storage)
        yield f"name of {inside}", str(inside).encode()
        if path.is_file() and inside.parts[0] not in ("studies", "quarantine", "results"):
            yield str(inside), path.read_bytes()
    for pid in processes(node.process.pid):
        for what in ("cmdline", "environ", "comm"):
            yield f"process {pid} {what}", (Path("/proc") / str(pid) / what).read_bytes()
    for path in Path("/proc", str(node.process.pid), "fd").iterdir():
        yield "an open file", str(path.readlink()).encode()
    for arguments in (["status"], ["status", "--json"], ["history"], ["history", "--json"], ["audit", "--json"]):
        done = node.cli(*arguments)
        yield " ".join(arguments), (done.stdout + done.stderr).encode()
    for study in {job["study_instance_uid"] for job in node.jobs()}:
        done = node.cli("history", study, "--json")
        yield "history of a study", (done.stdout + done.stderr).encode()
    token = (storage / "web.token").read_text().strip()
    for page in ("metrics", "health", "ready"):
        request = urllib.request.Request(
            f"http://{HERE}:{node.web_port}/{page}", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            yield page, answer.read()


def processes(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    children = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()
    return [pid, *(one for child in children for one in processes(int(child)))]


@pytest.mark.peer("openssl")
def test_nothing_but_images_and_results_says_who_the_patient_is(running, peers, tmp_path):
    monitor = Listener(running.folder / "storage" / "broker.sock")
    phantom = make_thorax(slices=24, size=(128, 147), spacing=(5.0, 2.5, 2.4), seed=1)
    chest = [identified(dcmread(path)) for path in write_series(phantom, tmp_path / "ct")]
    send_over_tls(running.tls_port, chest)
    running_odd = odd_series()
    with Connection(running.port) as connection:
        connection.associate(calling="SCANNER")
        for number, image in enumerate(running_odd, start=1):
            connection.send(message(STORE, command(*store_rq(image.SOPInstanceUID, number=number)), encoded(image)))
            assert connection.statuses() == [0x0000], number
    answers = said_to_hostile(running.port)
    promised = ask_to_commit(running.port)
    jobs = running.wait_until_idle(jobs=22, seconds=280)
    explained = running.cli(
        "explain", *map(str, sorted((running.folder / "storage" / "studies").rglob("*.dcm"))[:40:8])
    )

    assert peers[0].received > 0, "nothing was delivered"
    assert peers[1].received > 0, "nobody quoted the patient"
    assert {"done", "failed", "not_applicable"} <= {job["state"] for job in jobs}, [
        (job["state"], job["reason"], job["detail"]) for job in jobs
    ]
    seen = {where: found(content) for where, content in places(running)}
    seen["the broker's messages"] = found(monitor.said)
    seen["responses"] = found(answers) | found(promised)
    seen["explain"] = found(explained.stdout + explained.stderr)
    assert QUEUES[Kind.INFER].encode() in monitor.said, "nothing was heard of the broker"
    assert {where: texts for where, texts in seen.items() if texts} == {}


def odd_series() -> list[Dataset]:
    """Return images of series with the patient in places that are read, logged or counted."""
    made = []
    for number, (name, charset) in enumerate(
        ((GREEK, "ISO_IR 126"), (CYRILLIC, "ISO_IR 144"), (KANJI, ["", "ISO 2022 IR 87"]), (LATIN, "ISO_IR 100"))
    ):
        made.append(identified(ct(1, series=f"charset {number}"), name=name, charset=charset))
    described = ct(1, series="modality")
    described.Modality = "ZZYZXQ GEHEIMRAT"
    body = ct(1, series="body part")
    body.BodyPartExamined, body.ImageType, body.ConvolutionKernel = "ZZYZXQ", ["GEHEIMRAT", "ZZYZXQ"], "ZZYZXQ"
    frame = ct(1, series="frame of reference")
    frame.add_new(0x00200052, "UI", UID("1.2.3"))
    frame["FrameOfReferenceUID"]._value = NAME
    manufacturer = ct(1, series="manufacturer")
    manufacturer.Manufacturer = manufacturer.ManufacturerModelName = NAME
    short = ct(1, series="pixels")
    short.PixelData = NAME.encode()
    short["PixelData"].VR = "OW"
    for image in (described, body, frame, manufacturer, short):
        made.append(identified(image))
    twice = identified(ct(1, series="manufacturer", pixel=9))  # the same UID, other bytes: quarantine
    return [*made, twice]


def test_the_search_finds_what_is_there():
    assert found(f'{{"name": {json.dumps(GREEK)}}}') >= {"Ζυζξκ", "Κρυφός"}
    assert found(KANJI.encode("iso2022_jp")) >= {"患者"}
    assert found(b"born 1901-02-03") == {"1901-02-03"}
    assert found(b"nothing") == set()
