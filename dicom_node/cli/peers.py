"""Peers: who there is, and what each of them takes."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer
from pydicom.uid import UID

from dicom_node.cli.act import peer_named
from dicom_node.cli.console import (
    JsonOption,
    SettingsOption,
    console,
    existing_ledger,
    print_json,
    settings_from,
    table,
)
from dicom_node.config import Peer
from dicom_node.delivery import cstore
from dicom_node.errors import SettingsError
from dicom_node.services import RESULT_KINDS, RESULT_SOP_CLASSES

app = typer.Typer(name="peers", help="Who gets results, and what they take.", no_args_is_help=True)


@app.command(name="list")
def list_peers(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """List the peers of the settings and the results that each is sent."""
    peers = settings_from(settings).peer
    if as_json:
        print_json({name: peer.model_dump() for name, peer in peers.items()})
        return
    rows = [[name, peer.address, ", ".join(peer.results), peer.segmentation_type] for name, peer in peers.items()]
    console.print(table("Peers", ["name", "address", "results", "segmentations"], rows))


@app.command()
def probe(
    name: Annotated[str, typer.Argument(help="A peer of the settings or AETITLE@HOST:PORT.")],
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a peer by association which results it takes, and say what it would be sent. Nothing is stored there.

    The node remembers the answer for a day. Exits with 1 where a kind of its `results` is not taken.
    """
    loaded = settings_from(settings)
    peer = peer_named(loaded, name)
    answers = cstore.probe(peer, ae_title=loaded.node.ae_title, timing=loaded.delivery)
    with contextlib.suppress(SettingsError):  # where no node has run yet, there is nothing to remember it in
        existing_ledger(loaded).peers.answered(peer.address, answers, now=time.time())
    taken = {uid for (uid, _), accepted in answers.items() if accepted}
    verdicts = {kind: _verdict(kind, peer, taken) for kind in peer.results}
    if as_json:
        print_json(
            {
                "peer": peer.address,
                "accepted": [
                    {"sop_class_uid": uid, "transfer_syntax_uid": syntax, "accepted": accepted}
                    for (uid, syntax), accepted in answers.items()
                ],
                "results": verdicts,
            }
        )
    else:
        _show(answers, verdicts, peer)
    raise typer.Exit(0 if all(verdict == "taken" for verdict in verdicts.values()) else 1)


def _verdict(kind: str, peer: Peer, taken: set[str]) -> str:
    """Return `taken`, what is sent in its place, or that nothing is."""
    entries = {entry.name: entry for entry in RESULT_KINDS}
    wanted = set(entries[kind].sop_class_uids)
    if kind == "seg":
        wanted = {peer.wish.forms[0].sop_class_uid}
        fallback = {form.sop_class_uid for form in peer.wish.forms if form.sop_class_uid} & taken
        if not wanted & taken and fallback:
            return f"{RESULT_SOP_CLASSES[fallback.pop()]} instead"
    if wanted & taken:
        return "taken"
    for other in entries[kind].instead:
        if other in peer.results and set(entries[other].sop_class_uids) & taken:
            return f"{other} instead"
    return "not taken, and nothing in its place"


def _show(answers: cstore.Answers, verdicts: dict[str, str], peer: Peer) -> None:
    rows = []
    for uid, label in RESULT_SOP_CLASSES.items():
        syntaxes = [
            UID(syntax).name for (sop_class, syntax), accepted in answers.items() if sop_class == uid and accepted
        ]
        rows.append([label, ", ".join(syntaxes) if syntaxes else "[red]not taken[/red]"])
    console.print(table(f"What {peer.address} takes", ["SOP Class", "transfer syntaxes"], rows))
    console.print()
    wanted = [
        [kind, f"[green]{verdict}[/green]" if verdict == "taken" else f"[yellow]{verdict}[/yellow]"]
        for kind, verdict in verdicts.items()
    ]
    console.print(table("What it is sent", ["result", "answer"], wanted))
