"""The composition: settings in, a running node out; every part gets what it needs and knows no other."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path

import structlog

from dicom_node import heap, native, tally
from dicom_node.assembler import Assembler
from dicom_node.audit import Audit
from dicom_node.broker import answers, prepare_embedded, wait_until_ready
from dicom_node.config import Settings
from dicom_node.devices import count_gpus, devices
from dicom_node.dispatch import QUEUES, Dispatcher
from dicom_node.disposal import Disposal
from dicom_node.errors import Unavailable
from dicom_node.identity import identity, identity_of_part
from dicom_node.inspection import Inspection
from dicom_node.intake import Intake
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Kind
from dicom_node.metrics import CONTENT_TYPE, Metrics
from dicom_node.places import places_of
from dicom_node.promising import Promising
from dicom_node.recorder import Recorder
from dicom_node.scp import Scp
from dicom_node.secret import own_secret
from dicom_node.spool import Spool
from dicom_node.supervision import Child
from dicom_node.timekeeping import Timekeeping
from dicom_node.web import Page, Web

log = structlog.get_logger()

_RECEIVER_GRACE = 30.0  # seconds that what receives may take to finish what it has begun
_WORKER_GRACE = 20.0  # seconds that a worker may take to finish its job when the node stops
_MEGABYTE = 1024 * 1024
_DAY = 86400.0
_TRIM = 60.0  # seconds
_SHORTEST_PAUSE = 0.005  # seconds between two looks at what is due


class Node:
    """Everything that runs in the node's own process, and the children it keeps."""

    def __init__(self, settings: Settings, *, settings_path: Path | None = None) -> None:
        """Open spool and ledger; nothing listens yet."""
        self._settings = settings
        self._settings_path = settings_path
        node, receive = settings.node, settings.receive
        free = receive.minimum_free_megabytes * _MEGABYTE
        self._spool = Spool(node.storage, minimum_free=free, parts=receive.processes)
        self.node_id = identity(node.storage, host=socket.gethostname(), ae_title=node.ae_title, port=node.port)
        self.ledger = Ledger(settings.ledger_url, migrate=True)
        self._audit = Audit(settings, self.ledger)
        self._recorder = Recorder(self.ledger, self._spool, node_id=self.node_id, on_end=self._audit.received)
        self._promising = Promising(settings, self.ledger, self._spool, self._recorder)
        intake = Intake(self._spool, self._recorder)
        self._places = places_of(settings)
        self._scp = Scp(
            settings, self.ledger, intake, self._recorder, self._promising, self._audit, places=self._places
        )
        self._dispatcher = Dispatcher(settings, self.ledger)
        self._assembler = Assembler(
            self.ledger,
            self._spool,
            completion=settings.completion,
            routes=settings.routes,
            catalogue=settings.catalogue(),
            foresee=partial(self._dispatcher.foresee, within=settings.completion.settle),
        )
        self._disposal = Disposal(settings, self.ledger, self._spool, self._audit, node_id=self.node_id)
        self._timekeeping = Timekeeping(settings, self.ledger)
        self._children: list[Child] = []
        self._receivers: list[Child] = []
        self._web: Web | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._healthy = True
        self._reclaim_at = self._trim_at = 0.0

    def start(self) -> int:
        """Make good what an earlier life left, start the children, listen; return the port."""
        self._spool.own()
        self._places.clear()
        self.ledger.home.bind(own_secret(self._settings.node.storage, "storage.id"))
        leftovers = self._spool.sweep_incoming()
        if leftovers:
            log.info("spool.swept", temporary_files=leftovers)
        mine = [self.node_id, *(identity_of_part(self.node_id, part) for part in self._spool.inbox.taken_up())]
        self._audit.start([each for name in mine for each in self.ledger.arrivals.interrupted(name)])
        self._did(self._disposal.recover)
        for name in mine:
            self.ledger.arrivals.forget_associations_of(name, now=time.time())
        self._recorder.start()
        if not self._settings.node.broker:
            self._start_children()
        if not native.is_there:
            log.info(
                "native.absent", reason="installed without a C compiler, or DICOM_NODE_NATIVE=0: receiving is slower"
            )
        port = self._scp.start()
        self._promising.start()
        self._start_receivers()
        self._start_web()
        return port

    def run(self) -> None:
        """Assemble and dispatch until `stop` is called: when a series can be complete, and every `jobs.sweep`."""
        while not self._stop.is_set():
            pause = self._settings.jobs.sweep
            if self.tick(now=time.time()):
                pause = min(pause, max(self._assembler.due - time.time(), _SHORTEST_PAUSE))
            self._wake.wait(pause)
            self._wake.clear()

    def wake(self) -> None:
        """Look now at what is due, from any thread: something has happened that a series may have waited for."""
        self._wake.set()

    def tick(self, *, now: float) -> bool:
        """Do everything that is due, once; return whether every part could: one that cannot costs no other part."""
        parts: list[Callable[[], object]] = [partial(self._timekeeping.tick, now=now)]
        parts += [child.watch for child in [*self._children, *self._receivers]]
        parts += [partial(self._spool.watch_room, partial(self._note_door, now))]
        parts += [self._scp.reap, partial(self._assembler.tick, now=now), partial(self._dispatcher.sweep, now=now)]
        parts += [self._audit.tick]
        parts += [partial(self._disposal.tick, now=now), self._reclaim, self._trim]
        did = all([self._did(part) for part in parts])
        if did:
            self._healthy = True
        return did

    def _reclaim(self) -> None:
        """Once a day: delete what attempts that were killed have written in vain, in a thread of its own."""
        if time.monotonic() >= self._reclaim_at:
            self._reclaim_at = time.monotonic() + _DAY
            threading.Thread(target=self._did, args=(self._delete_unrecorded,), name="reclaim", daemon=True).start()

    def _trim(self) -> None:
        """Once a minute: give back the memory that is free."""
        if time.monotonic() >= self._trim_at:
            self._trim_at = time.monotonic() + _TRIM
            heap.trim()

    def _delete_unrecorded(self) -> None:
        inspection = Inspection(self.ledger, self._settings.node.storage, grace=_DAY)
        number = self._spool.sweep_incoming(older_than=_DAY)
        for path in inspection.unrecorded_results():
            path.unlink(missing_ok=True)
            number += 1
        if number:
            log.info("results.reclaimed", files=number)

    def _did(self, part: Callable[[], object]) -> bool:
        try:
            part()
        except Unavailable as error:
            if self._healthy:
                log.error("node.waiting", reason=str(error))
            self._healthy = False
            return False
        except Exception as error:  # a defect of ours must not stop the node
            log.exception("node.defect", error=type(error).__name__)
            return False
        return True

    def _note_door(self, now: float, name: str, free: int) -> None:
        self.ledger.history.note(name, now=now, free_megabytes=free // _MEGABYTE)

    def ask_to_stop(self) -> None:
        """Make `run` return; safe to call from a signal handler."""
        self._stop.set()
        self._wake.set()

    def stop(self) -> None:
        """Finish the instances in flight and the jobs that run, then end everything."""
        for receiver in self._receivers:
            receiver.ask_to_stop()
        self._promising.stop()
        self._scp.stop()
        self._recorder.stop()
        for receiver in self._receivers:
            receiver.stop(grace=_RECEIVER_GRACE)
        if self._web is not None:
            self._web.stop()
        broker, workers = self._children[:1], self._children[1:]
        for child in workers:
            child.ask_to_stop()
        deadline = time.monotonic() + _WORKER_GRACE
        for child in workers:
            child.stop(grace=max(0.1, deadline - time.monotonic()))
        for child in broker:
            child.ask_to_stop()
            child.stop(grace=5.0)
        self._dispatcher.close()
        self._audit.stop()
        self.ledger.close()
        self._spool.disown()

    # -- for whoever watches ----------------------------------------------------------------------------------

    def _start_web(self) -> None:
        table, storage = self._settings.web, self._settings.node.storage
        if table.port is None:
            return
        token = table.token or own_secret(storage, "web.token")
        self._web = Web(table.host, table.port, token=token, pages=self._pages())
        self._web.start()

    def _pages(self) -> Mapping[str, Page]:
        metrics = Metrics(
            self.ledger,
            self._settings.node.storage,
            associations=self._places.number,
            broker_answers=lambda: answers(self._settings),
        )

        def ready() -> tuple[HTTPStatus, str, bytes]:
            parts = {
                "ledger": metrics.ledger_answers(),
                "broker": metrics.broker_answers(),
                "room": self._has_room(),
            }
            lines = "".join(f"{name}: {'yes' if fine else 'no'}\n" for name, fine in parts.items())
            status = HTTPStatus.OK if all(parts.values()) else HTTPStatus.SERVICE_UNAVAILABLE
            return status, "text/plain; charset=utf-8", lines.encode()

        return {
            "/health": lambda: (HTTPStatus.OK, "text/plain; charset=utf-8", b"alive\n"),
            "/ready": ready,
            "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE, metrics.text()),
        }

    def _has_room(self) -> bool:
        try:
            self._spool.require_room()
        except (Unavailable, OSError):
            return False
        return True

    # -- children -------------------------------------------------------------------------------------------

    def _start_receivers(self) -> None:
        """Start the further processes that receive."""
        for part in range(1, self._settings.receive.processes):
            receiver = self._receiver(part)
            self._receivers.append(receiver)
            receiver.start()

    def _receiver(self, part: int) -> Child:
        return Child(
            f"receiver {part}",
            lambda: self._receiver_command(part),
            on_death=lambda _pid: self._places.clear(part),
            on_line=tally.count_line,
        )

    def _receiver_command(self, part: int) -> Sequence[str]:
        ports = self._scp.ports
        command = [sys.executable, "-m", "dicom_node.receiver", "--part", str(part), "--node-id", self.node_id]
        command += ["--parent", str(os.getpid()), "--port", str(ports[0]), "--tls-port", str(ports[-1])]
        if self._settings_path is not None:
            command += ["--settings", str(self._settings_path)]
        return command

    def _start_children(self) -> None:
        """Start the embedded broker, then a worker for each device that runs models, and one that delivers."""
        self._abandon_workers("")
        broker = Child("broker", lambda: prepare_embedded(self._settings))
        self._children = [broker]  # known before it is waited for, so that `stop` ends it where that is in vain
        wait_until_ready(self._settings, broker.start())
        node = self._settings.node
        workers = [(Kind.INFER, device) for device in devices(node.device, node.workers, gpus=count_gpus())]
        for kind, device in [*workers, (Kind.DELIVER, "cpu")]:
            worker = self._worker(QUEUES[kind], device)
            self._children.append(worker)
            worker.start()

    def _worker(self, queue: str, device: str) -> Child:
        def died(pid: int) -> None:
            self._abandon_workers(f"{queue}:{pid}")

        return Child(f"worker {queue} {device}", lambda: self._worker_command(queue, device), on_death=died)

    def _worker_command(self, queue: str, device: str) -> Sequence[str]:
        command = [sys.executable, "-m", "workers", "--queue", queue, "--parent", str(os.getpid())]
        command += ["--name", f"{self.node_id}#{queue}", "--device", device]
        if self._settings_path is not None:
            command += ["--settings", str(self._settings_path)]
        return command

    def _abandon_workers(self, which: str) -> None:
        """Put back at once what a dead worker of ours held; where the ledger is away, its lease will do it."""
        try:
            number = self.ledger.jobs.abandon_worker(
                f"{self.node_id}#{which}", maximum_deaths=self._settings.jobs.maximum_deaths, now=time.time()
            )
        except Unavailable as error:
            log.error("jobs.not_recovered", reason=str(error))
            return
        if number:
            log.warning("jobs.recovered", number=number, reason="their worker died")
