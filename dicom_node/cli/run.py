"""Run the node, or show what it does."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dicom_node import __version__, heap, log
from dicom_node.cli.console import SettingsOption
from dicom_node.config import CANDIDATES, Settings, load
from dicom_node.niceness import come_first


def serve(
    settings: SettingsOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run the node until SIGTERM or Ctrl-C.

    Without a broker in the settings this one command is everything: receiver, ledger, an embedded broker, and
    a worker process each for models and for deliveries. With `broker = "redis://..."` start `dicom-node-worker`
    on as many machines as you like.
    """
    from dicom_node.node import Node  # other commands need not wait for what only a node needs

    come_first()
    heap.keep_small()
    log.configure(verbose=verbose)
    path = settings or next((candidate for candidate in CANDIDATES if candidate.is_file()), None)
    loaded = load(path)
    node = Node(loaded, settings_path=path.absolute() if path else None)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.ask_to_stop())
    try:
        port = node.start()
        heap.settle()
        _banner(loaded, port, path)
        node.run()
    finally:
        node.stop()
    typer.echo("stopped", err=True)


def _banner(settings: Settings, port: int, path: Path | None) -> None:
    from dicom_node.broker import socket_path

    node = settings.node
    grid = Table.grid(padding=(0, 2))
    grid.add_row("AE title", f"[bold]{node.ae_title}[/bold]")
    grid.add_row("listens on", f"{node.host}:{port}")
    grid.add_row("settings", str(path or "defaults (no node.toml here)"))
    grid.add_row("storage", str(node.storage))
    grid.add_row("ledger", settings.ledger_url if settings.ledger_url.startswith("sqlite") else "PostgreSQL")
    grid.add_row("broker", "Redis" if node.broker else f"embedded, {socket_path(settings)}")
    if settings.web.port is not None:
        token = "web.token" if settings.web.token else f"the token in {node.storage / 'web.token'}"
        grid.add_row("web", f"http://{settings.web.host}:{settings.web.port}/metrics, behind {token}")
    for name, model in settings.catalogue().items():
        grid.add_row("model", f"{name} {model.manifest.version}  [dim]{model.manifest.title}[/dim]")
    for name, peer in settings.peer.items():
        grid.add_row("peer", f"{name} = {peer.ae_title} at {peer.host}:{peer.port}  gets {', '.join(peer.results)}")
    for route in settings.routes:
        when = ", ".join(f"{key} is {pattern}" for key, pattern in route.when.items()) or "always"
        what = f"run {', '.join(route.run)}, send to {', '.join(route.send_to)}"
        grid.add_row("route", f"{route.name}: when {when}, {what}")
    if not settings.route:
        grid.add_row("route", "[yellow]none: what arrives is kept, and no model runs[/yellow]")
    console = Console(stderr=True)
    console.print(f"\n[bold]dicom-node {__version__}[/bold]")
    console.print(grid)
    console.print()


def demo(
    study: Annotated[Path | None, typer.Argument(help="A folder with one study; by default one is generated.")] = None,
    output: Annotated[Path, typer.Option(help="Where results and the picture go.")] = Path("demo-output"),
) -> None:
    """Show the node at work: push a study by C-STORE, run the models, receive SEG and SR at a PACS, draw them."""
    from dicom_node.demo.show import run_demo  # here: whoever serves for a year needs none of it

    raise typer.Exit(run_demo(study, output))
