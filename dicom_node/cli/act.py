"""Act: queue a job again or cancel it, send files, knock at a peer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dicom_node.catalogue import suggestion
from dicom_node.cli.console import JsonOption, SettingsOption, console, existing_ledger, print_json, settings_from
from dicom_node.config import DeliveryTable, Peer, Settings
from dicom_node.delivery import cstore
from dicom_node.errors import NodeError, SettingsError

_CONTEXTS = 128  # presentation contexts that one association can have (PS3.8 9.3.2.2: odd numbers of a byte)


def requeue(
    job_ids: Annotated[list[int], typer.Argument(help="Numbers of jobs, as `status` shows them.")],
    settings: SettingsOption = None,
) -> None:
    """Queue jobs again that failed, were cancelled or did not apply; or send a finished delivery once more."""
    ledger = existing_ledger(settings_from(settings))
    for job_id in job_ids:
        job = ledger.jobs.requeue(job_id, now=time.time())
        console.print(f"job {job_id} is queued again: {job.kind} {job.model}" + (f" to {job.peer}" if job.peer else ""))


def cancel(
    job_ids: Annotated[list[int], typer.Argument(help="Numbers of jobs, as `status` shows them.")],
    settings: SettingsOption = None,
) -> None:
    """Cancel jobs that are queued or running; a running model stops within seconds. `requeue` brings them back."""
    ledger = existing_ledger(settings_from(settings))
    for job_id in job_ids:
        job = ledger.jobs.withdraw(job_id, now=time.time())
        console.print(f"job {job_id} is cancelled: {job.kind} {job.model}" + (f" to {job.peer}" if job.peer else ""))


def send(
    paths: Annotated[list[Path], typer.Argument(help="Files, or folders to send with all that is in them.")],
    to: Annotated[
        str | None, typer.Option(help="A peer of the settings or AETITLE@HOST:PORT; by default this node.")
    ] = None,
    calling: Annotated[str, typer.Option(help="Our own AE title.")] = "DICOM_NODE_SCU",
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send DICOM files by C-STORE on one association, as a scanner would. Exits with 1 where not all were stored."""
    peer = peer_named(settings_from(settings), to)
    parcels = [cstore.Parcel.of_file(path) for path in _files(paths)]
    if not parcels:
        raise SettingsError("there is no file to send")
    if len(cstore.contexts_for(parcels)) > _CONTEXTS:
        raise SettingsError(f"more than {_CONTEXTS} kinds of object: send fewer at a time")
    started = time.monotonic()
    stored, problem = _send_all(parcels, peer, calling, quiet=as_json)
    seconds = time.monotonic() - started
    if as_json:
        print_json({"stored": stored, "of": len(parcels), "seconds": round(seconds, 3), "problem": problem})
    else:
        console.print(f"{stored} of {len(parcels)} stored at {peer.ae_title} in {seconds:.1f} s")
        if problem:
            console.print(f"[red]{problem}[/red]")
    raise typer.Exit(0 if stored == len(parcels) else 1)


def _send_all(parcels: list[cstore.Parcel], peer: Peer, calling: str, *, quiet: bool) -> tuple[int, str | None]:
    columns = (TextColumn("sending"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stored = 0
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task("", total=len(parcels))

        def sent(_parcel: cstore.Parcel, _status: int) -> None:
            nonlocal stored
            stored += 1
            progress.advance(task)

        try:
            cstore.deliver(parcels, peer, ae_title=calling, timing=DeliveryTable(), sent=sent)
        except NodeError as error:
            return stored, str(error)
    return stored, None


def echo(
    peers: Annotated[list[str] | None, typer.Argument(help="Peers of the settings or AETITLE@HOST:PORT.")] = None,
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send a C-ECHO to peers, by default to all of them. Exits with 1 where one does not answer."""
    loaded = settings_from(settings)
    names = peers or list(loaded.peer)
    if not names:
        raise SettingsError("there is no [peer.NAME] in the settings: name one as AETITLE@HOST:PORT")
    answers = {name: _knock(loaded, name) for name in names}
    if as_json:
        print_json(answers)
    else:
        for name, problem in answers.items():
            console.print(f"{name}: [red]{problem}[/red]" if problem else f"{name}: [green]answers[/green]")
    raise typer.Exit(1 if any(answers.values()) else 0)


def _knock(settings: Settings, name: str) -> str | None:
    peer = peer_named(settings, name)
    try:
        cstore.echo(peer, ae_title=settings.node.ae_title, timing=settings.delivery)
    except NodeError as error:
        return str(error)
    return None


def peer_named(settings: Settings, name: str | None) -> Peer:
    """Return a peer by name or address; the node itself where there is no name."""
    if name is None:
        return Peer(ae_title=settings.node.ae_title, host="127.0.0.1", port=settings.node.port)
    if name in settings.peer:
        return settings.peer[name]
    title, at, address = name.partition("@")
    host, colon, port = address.rpartition(":")
    if not (at and colon and port.isdigit()):
        raise SettingsError(f"no [peer.{name}]{suggestion(name, dict(settings.peer))}, and not AETITLE@HOST:PORT")
    return Peer(ae_title=title, host=host, port=int(port))


def _files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.is_file())
        else:
            yield path
