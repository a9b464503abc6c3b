"""Receiving: throughput and processor time, memory with large objects, and what slow senders do to fast ones."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian
from pynetdicom import AE

from bench import cases
from bench.measure import Absent, Figure, alternate, figure, processor_time, resident_growth
from bench.peers import Dcmtk, Node, NodeOfTwo, Orthanc, Receiver, Sender, StockPynetdicom, SyncingDcmtk, wait_for

THROUGHPUT_BARS: Mapping[str, float] = {Dcmtk.name: 1.0, StockPynetdicom.name: 4.0}
PROCESSOR_BARS: Mapping[str, float] = {Dcmtk.name: 1.0}
_INSTANCES = {1: 300, 8: 600, 32: 1280}  # by associations: each must send for longer than it takes to begin
_ORTHANC = 60  # instances: it is an order of magnitude slower


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Measure everything about receiving."""
    with scratch() as folder:  # nothing of it is deleted between the parts, for the same reason as in `sources`
        found = [each for number in (1, 8, 32) for each in throughput(folder, number, rounds=rounds, quick=quick)]
        for number in (1, 8):
            found += throughput(folder, number, rounds=1 if quick else min(rounds, 3), quick=quick, beside=1)
        found += several(folder, rounds=rounds, quick=quick)
        found += idle(folder, rounds=1 if quick else min(rounds, 3))
        found += memory(folder, (500,) if quick else (500, 2000), rounds=1 if quick else min(rounds, 3))
        found += crawling(folder, rounds=1 if quick else min(rounds, 3))
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder on a disk, not in memory: BENCH_SCRATCH, or one under /var/tmp."""
    parent = os.environ.get("BENCH_SCRATCH", "/var/tmp")
    folder = Path(tempfile.mkdtemp(prefix="dicom-node-bench-", dir=parent))
    folder.chmod(0o755)  # PostgreSQL has a user of its own
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def sources(folder: Path) -> Iterator[Path]:
    """Give a folder for what is sent: in memory, where there is one, for a scanner is another machine.

    On the disk of the receivers it would be in their way: ext4 looks at every inode that was freed within minutes
    before it gives one to the next file.
    """
    shared = Path("/dev/shm")
    where = Path(tempfile.mkdtemp(prefix="dicom-node-bench-", dir=shared if shared.is_dir() else folder))
    try:
        yield where
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _started(stack: ExitStack, folder: Path, *makers: Callable[[Path], Receiver]) -> dict[str, Receiver]:
    """Start every receiver that is installed; all of them run throughout, one is sent to at a time."""
    found: dict[str, Receiver] = {}
    for number, make in enumerate(makers):
        receiver = make(folder / f"receiver-{number}")
        try:
            found[receiver.name] = stack.enter_context(receiver)
        except Absent:
            continue
    return found


# -- throughput and processor time --------------------------------------------------------------------------------


def throughput(folder: Path, associations: int, *, rounds: int, quick: bool, beside: int = 0) -> list[Figure]:
    """Measure instances a second and processor time for each instance, with so many associations at once.

    Every receiver takes a few in before it is measured: it would have been running for months. `beside` programs keep a
    processor busy each meanwhile.
    """
    files = cases.chest_ct(*((60, 512) if quick else ()))
    instances = _INSTANCES[associations] // (4 if quick else 1)
    here = folder / f"throughput-{associations}-{beside}"
    with ExitStack() as stack:
        dcmtk, syncing = (partial(kind, fork=associations > 1) for kind in (Dcmtk, SyncingDcmtk))
        peers = (Node, dcmtk, syncing, StockPynetdicom, *(() if beside else (Orthanc,)))
        receivers = _started(stack, here, *peers)
        sender = Sender(here / "sender")
        study = stack.enter_context(sources(folder)) / "study"

        def run(receiver: Receiver) -> Callable[[], Mapping[str, float]]:
            number = min(instances, max(_ORTHANC, associations)) if isinstance(receiver, Orthanc) else instances
            return lambda: received(receiver, sender, files, study, associations, number)

        for receiver in receivers.values():
            received(receiver, sender, files, study, associations, 4 * associations)
        stack.enter_context(_busy(beside))
        measured = alternate({name: run(receiver) for name, receiver in receivers.items()}, rounds)
    title = f"receive, {associations} association{'s' * (associations > 1)}"
    if beside:
        title += f", beside {beside} busy program{'s' * (beside > 1)}"
    return [
        figure(measured, f"{title}: throughput", "instances/s", quantity="rate", better="higher", bars=THROUGHPUT_BARS),
        figure(measured, f"{title}: processor time", "ms/instance", quantity="processor", bars=PROCESSOR_BARS),
    ]


def several(folder: Path, *, rounds: int, quick: bool) -> list[Figure]:
    """Measure what a second process that receives brings: for slices, and for images that are small."""
    found = []
    for size, number in ((512, 8), (512, 32), (64, 8)):
        here = folder / f"several-{size}-{number}"
        files = cases.chest_ct(60, size)
        instances = _INSTANCES[number] * (4 if size == 64 else 1) // (4 if quick else 1)
        with ExitStack() as stack:
            receivers = _started(stack, here, Node, NodeOfTwo)
            sender = Sender(here / "sender")
            study = stack.enter_context(sources(folder)) / "study"

            def run(
                receiver: Receiver,
                sender: Sender = sender,
                files: Sequence[Path] = files,
                study: Path = study,
                number: int = number,
                instances: int = instances,
            ) -> Mapping[str, float]:
                return received(receiver, sender, files, study, number, instances)

            for receiver in receivers.values():
                received(receiver, sender, files, study, number, 4 * number)
            measured = alternate({name: partial(run, receiver) for name, receiver in receivers.items()}, rounds)
        title = f"receive with one process, {number} associations, {size} x {size} pixels"
        found.append(figure(measured, f"{title}: throughput", "instances/s", quantity="rate", better="higher"))
        found.append(figure(measured, f"{title}: processor time", "ms/instance", quantity="processor"))
    return found


@contextmanager
def _busy(programs: int) -> Iterator[None]:
    """Keep as many processors busy as other programs would that compute and never wait."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def received(
    receiver: Receiver, sender: Sender, files: Sequence[Path], study: Path, associations: int, instances: int
) -> dict[str, float]:
    """Send one new study; return instances a second ("rate") and ms of processor time for each ("processor").

    It waits until all is on record, so that what follows the last response is counted as well.
    """
    copies = cases.copies(files, study, associations=associations, instances=instances)
    os.sync()  # what earlier cases left to be written is not this one's
    before, already = processor_time(receiver.pid), receiver.stored()
    sent = sender.send(receiver.port, copies.folders)
    wait_for("all instances to be on record", lambda: receiver.stored() - already >= copies.number, seconds=60)
    spent = processor_time(receiver.pid) - before
    if sent.acknowledged != copies.number:
        raise RuntimeError(f"{receiver.name} acknowledged {sent.acknowledged} of {copies.number} instances")
    shutil.rmtree(study)
    return {"rate": copies.number / sent.seconds, "processor": 1000 * spent / copies.number}


def idle(folder: Path, *, rounds: int) -> list[Figure]:
    """Measure what a receiver costs while nobody sends: it is part of every processor time above."""

    def spent(receiver: Receiver) -> float:
        before, began = processor_time(receiver.pid), time.monotonic()
        time.sleep(5.0)
        return 1000 * (processor_time(receiver.pid) - before) / (time.monotonic() - began)

    with ExitStack() as stack:
        receivers = _started(stack, folder / "idle", Node, Dcmtk, StockPynetdicom, Orthanc)
        measured = alternate({name: partial(spent, receiver) for name, receiver in receivers.items()}, rounds)
    note = "with its broker and two workers, where it has them"
    return [figure(measured, "receive, nobody sends: processor time", "ms/s", note=note)]


# -- memory ---------------------------------------------------------------------------------------------------------


def memory(folder: Path, megabytes: Sequence[int], *, rounds: int) -> list[Figure]:
    """Measure how much the receiver's memory grows while one large object comes in."""
    found = []
    here = folder / "memory"
    with ExitStack() as stack:
        receivers = _started(stack, here, Node, Dcmtk, StockPynetdicom)
        sender = Sender(here / "sender")
        for size in megabytes:

            def grow(receiver: Receiver, size: int = size) -> float:
                where = here / "object"
                where.mkdir()
                cases.multi_frame(size, where)
                with resident_growth(receiver.pid) as growth:
                    sender.send(receiver.port, [where])
                shutil.rmtree(where)
                receiver.clear()
                os.sync()
                return growth()

            runs = {name: partial(grow, receiver) for name, receiver in receivers.items()}
            measured = alternate(runs, rounds)
            limit = 64.0  # MB: buffers, whatever the size of the object
            found.append(figure(measured, f"receive, one object of {size} MB: memory", "MB more", limit=limit))
    return found


# -- slow senders ---------------------------------------------------------------------------------------------------


def crawling(folder: Path, *, rounds: int) -> list[Figure]:
    """Measure 60 CT slices on one association, alone and beside 16 senders that crawl and one of a large object."""
    here = folder / "crawling"
    with ExitStack() as stack:
        receivers = _started(stack, here, Node, partial(Dcmtk, fork=True), StockPynetdicom)
        sender, heavy = Sender(here / "sender"), Sender(here / "heavy")
        large = here / "large"
        large.mkdir()
        cases.multi_frame(500, large)
        study = stack.enter_context(sources(folder)) / "study"

        def run(receiver: Receiver) -> dict[str, float]:
            alone = _fast(receiver, sender, study)
            with _crawlers(receiver.port, 16):
                beside = _fast(receiver, sender, study)
                large_one = heavy.start(receiver.port, large)
                mixed = _fast(receiver, sender, study)
                large_one.wait(120)
            receiver.clear()
            return {"crawling": beside / alone, "mixed": mixed / alone}

        measured = alternate({name: partial(run, receiver) for name, receiver in receivers.items()}, rounds)
    note = "time of 60 slices beside the others, divided by their time alone"
    return [
        figure(measured, "receive, beside 16 crawling senders", "times", quantity="crawling", limit=1.5, note=note),
        figure(measured, "receive, beside them and a 500 MB object", "times", quantity="mixed", note=note),
    ]


def _fast(receiver: Receiver, sender: Sender, study: Path) -> float:
    copies = cases.copies(cases.chest_ct(60, 512), study, associations=1, instances=60)
    os.sync()
    taken = sender.send(receiver.port, copies.folders).seconds
    shutil.rmtree(study)
    return taken


@contextmanager
def _crawlers(port: int, number: int) -> Iterator[None]:
    """Keep associations open that send a byte of a C-STORE now and then."""
    stop = threading.Event()
    threads = [threading.Thread(target=_crawl, args=(port, stop), daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)


def _crawl(port: int, stop: threading.Event) -> None:
    """Associate, announce a C-STORE of a CT image, and send its data set 20 bytes at a time."""
    entity = AE(ae_title="CRAWLER")
    entity.add_requested_context(CTImageStorage, ImplicitVRLittleEndian)
    association = entity.associate("127.0.0.1", port)
    if not association.is_established:
        return
    context: Any = association.accepted_contexts[0].context_id
    connection: Any = association.dul.socket
    wire: socket.socket = connection.socket
    try:
        wire.sendall(_pdu(context, 3, _store_request()))
        fragment = _pdu(context, 0, bytes(16_000))
        for at in range(0, len(fragment), 20):
            if stop.wait(0.1):
                break
            wire.sendall(fragment[at : at + 20])
    except OSError:  # the receiver has had enough
        pass
    finally:
        association.abort()


def _pdu(context: int, control: int, content: bytes) -> bytes:
    """Return a P-DATA-TF PDU with one presentation data value (PS3.8 Section 9.3.5)."""
    value = struct.pack(">IBB", len(content) + 2, context, control) + content
    return struct.pack(">BBI", 4, 0, len(value)) + value


def _store_request() -> bytes:
    """Return the command set of a C-STORE-RQ (PS3.7 Section 9.3.1.1)."""
    instance = f"2.25.{uuid.uuid4().int}".encode()
    elements = [
        (0x0002, _even(CTImageStorage.encode())),
        (0x0100, struct.pack("<H", 0x0001)),
        (0x0110, struct.pack("<H", 1)),
        (0x0700, struct.pack("<H", 0)),
        (0x0800, struct.pack("<H", 0)),
        (0x1000, _even(instance)),
    ]
    body = b"".join(struct.pack("<HHI", 0, element, len(value)) + value for element, value in elements)
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _even(value: bytes) -> bytes:
    return value + b"\0" * (len(value) % 2)
