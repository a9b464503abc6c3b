"""A further process that receives, beside the node's own and on the same ports (SO_REUSEPORT).

The kernel gives each connection to one of them. What this one has acknowledged lies in a part of the inbox that is its
own, until it has recorded it; everything else is the node's. It ends with the node, which starts it again if it died.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import structlog
import typer

from dicom_node import heap, log, tally
from dicom_node.audit import Audit
from dicom_node.config import Settings, load
from dicom_node.errors import NodeError, Unavailable
from dicom_node.identity import identity_of_part
from dicom_node.intake import Intake
from dicom_node.ledger import Ledger
from dicom_node.places import places_of
from dicom_node.promising import PromisingOnBehalf
from dicom_node.recorder import Recorder
from dicom_node.scp import Scp
from dicom_node.spool import Spool
from dicom_node.supervision import die_with

logger = structlog.get_logger()

_MEGABYTE = 1024 * 1024
_TICK = 0.5  # seconds
_TRIM = 120  # ticks


class Receiver:
    """What receives in a further process."""

    def __init__(self, settings: Settings, *, node_id: str, part: int) -> None:
        """Be number `part` of the processes that receive for a node; nothing listens yet."""
        receive, storage = settings.receive, settings.node.storage
        free = receive.minimum_free_megabytes * _MEGABYTE
        self._name = identity_of_part(node_id, part)
        self._spool = Spool(storage, minimum_free=free, part=part, parts=receive.processes)
        self._ledger = Ledger(settings.ledger_url)
        self._audit = Audit(settings, self._ledger)
        self._recorder = Recorder(self._ledger, self._spool, node_id=self._name, on_end=self._audit.received)
        self._promising = PromisingOnBehalf(settings, self._ledger, self._spool, self._recorder)
        self._places, self._part = places_of(settings, part=part), part
        self._scp = Scp(
            settings,
            self._ledger,
            Intake(self._spool, self._recorder),
            self._recorder,
            self._promising,
            self._audit,
            places=self._places,
            joins=True,
        )
        self._stop = threading.Event()

    def start(self) -> None:
        """Make good what an earlier life left, then listen.

        Raises SettingsError where that is not over yet.
        """
        self._spool.inbox.own()
        self._places.clear(self._part)
        for path in self._spool.inbox.unfinished():
            path.unlink(missing_ok=True)
        self._audit.interrupted(self._ledger.arrivals.interrupted(self._name))
        self._ledger.arrivals.forget_associations_of(self._name, now=time.time())
        self._recorder.start()
        self._scp.start()
        self._promising.start()

    def run(self) -> None:
        """Receive until `ask_to_stop` is called."""
        ticks = 0
        while not self._stop.wait(_TICK):
            ticks += 1
            for part in (self._scp.reap, self._audit.tick, *([heap.trim] if ticks % _TRIM == 0 else [])):
                self._did(part)

    def _did(self, part: Callable[[], object]) -> None:
        try:
            part()
        except Unavailable:
            pass  # the node says so
        except Exception as error:  # a defect of ours must not end who receives
            logger.exception("node.defect", error=type(error).__name__)

    def ask_to_stop(self) -> None:
        """Make `run` return; safe to call from a signal handler."""
        self._stop.set()

    def stop(self) -> None:
        """Finish the instances in flight, and record what has arrived."""
        self._promising.stop()
        self._scp.stop()
        self._recorder.stop()
        self._audit.finish()
        self._ledger.close()
        self._spool.disown()


def run(
    part: Annotated[int, typer.Option()],
    node_id: Annotated[str, typer.Option()],
    parent: Annotated[int, typer.Option()],
    port: Annotated[int, typer.Option()],
    tls_port: Annotated[int, typer.Option()],
    settings: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Receive for the node that has started this."""
    os.umask(0o027)  # images of patients are nobody else's
    heap.keep_small()
    log.configure()
    die_with(parent)
    os.set_blocking(sys.stdout.fileno(), False)
    tally.count_elsewhere(_tell)
    try:
        receiver = Receiver(_listening_on(load(settings), port, tls_port), node_id=node_id, part=part)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: receiver.ask_to_stop())
        try:
            receiver.start()
            heap.settle()
            receiver.run()
        finally:
            receiver.stop()
    except NodeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error


def _tell(line: str) -> None:
    """Bring a line to the node, in one piece, for a pipe takes more at once; a node that does not read goes without."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), line.encode())


def _listening_on(settings: Settings, port: int, tls_port: int) -> Settings:
    """Return settings with the ports that the node listens on: it may have been given any."""
    node = settings.node.model_copy(update={"port": port})
    return settings.model_copy(update={"node": node, "tls": settings.tls.model_copy(update={"port": tls_port})})


if __name__ == "__main__":
    typer.run(run)
