"""dicom-node-worker: one process that runs one job at a time, until it is told to stop."""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import Annotated

import structlog
import typer

from dicom_node import config, heap, log
from dicom_node.dispatch import QUEUES
from dicom_node.errors import NodeError, Unavailable
from dicom_node.ledger import Ledger
from dicom_node.lifecycle import Kind
from dicom_node.messages import celery_settings
from dicom_node.niceness import come_last, wait_asleep
from dicom_node.spool import Spool
from dicom_node.supervision import die_with
from workers.app import SecurityWarning, make_app
from workers.pipeline import Pipeline

logger = structlog.get_logger()

_PAUSE = 2.0  # seconds between two looks at a ledger that is not there yet


def run(
    queue: Annotated[list[str] | None, typer.Option(help="Take only this kind of work: infer or deliver.")] = None,
    settings: Annotated[Path | None, typer.Option(help="node.toml; by default the node's own places.")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the ledger; by default that of the host.")] = None,
    device: Annotated[str | None, typer.Option(help="Instead of node.device: cpu, cuda, cuda:N.")] = None,
    parent: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Work on jobs from the broker, one at a time: infer on this machine's device, or deliver.

    Start as many as you like, on as many machines as you like; they share the ledger and the storage folder.
    """
    os.umask(0o027)  # images of patients are nobody else's
    log.configure()
    heap.use_large_pages()
    wait_asleep()
    # as root in a container; the warning is about pickles, and only JSON is accepted
    warnings.filterwarnings("ignore", category=SecurityWarning)
    queues = queue or list(QUEUES.values())
    if unknown := set(queues) - set(QUEUES.values()):
        raise typer.BadParameter(f"no such queue: {', '.join(unknown)} (there is: {', '.join(QUEUES.values())})")
    if parent is not None:
        die_with(parent)
        come_last()  # on the node's own machine a model must not slow the receiver down
    try:
        loaded = config.load(settings)
        if device is not None:
            loaded = loaded.model_copy(update={"node": loaded.node.model_copy(update={"device": device})})
        ledger = _opened(loaded.ledger_url)
        spool = Spool(loaded.node.storage)
        broker = celery_settings(loaded)
    except NodeError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    identity = f"{name or socket.gethostname() + '#' + '+'.join(queues)}:{os.getpid()}"
    pipeline = Pipeline(loaded, ledger, spool, worker=identity)
    app = make_app(broker, pipeline.run, pipeline.stop, pipeline.foresee)
    if QUEUES[Kind.INFER] in queues:
        threading.Thread(target=_warm, args=(pipeline,), name="warms models", daemon=True).start()
    heap.settle()
    logger.info("worker.ready", queues=queues, device=loaded.node.device)
    worker = app.Worker(
        pool="solo",
        queues=queues,
        hostname=identity.replace("@", "-"),
        loglevel="ERROR",
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
        quiet=True,
    )
    try:
        worker.start()
    finally:
        pipeline.close()


def _warm(pipeline: Pipeline) -> None:
    with heap.at_rest():
        pipeline.warm()
    heap.settle()


def _opened(url: str) -> Ledger:
    """Open the ledger; wait for the node to bring its tables to this version, where it has not yet."""
    ledger = Ledger(url)
    said = ""
    while True:
        try:
            ledger.require_schema()
            return ledger
        except Unavailable as error:
            if str(error) != said:
                logger.warning("worker.waiting", reason=str(error))
            said = str(error)
            time.sleep(_PAUSE)


def main() -> None:
    """Run the command."""
    typer.run(run)


if __name__ == "__main__":
    main()
