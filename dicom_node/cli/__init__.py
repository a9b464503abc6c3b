"""The command line: one file for each thing that a person wants: run it, ask it, act on it, understand it."""

from __future__ import annotations

import os
import sys

import typer

from dicom_node import __version__, log
from dicom_node.cli import act, ask, models, peers, run, understand, verify
from dicom_node.errors import NodeError
from dicom_node.lifecycle import IllegalTransition

app = typer.Typer(
    name="dicom-node",
    help="A DICOM-native node that puts imaging AI into a hospital: C-STORE in, SEG and Structured Report out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dicom-node {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Say which one."),
) -> None:
    """Exit codes: 0 it worked; 1 it ran and the answer is no; 2 the request or a settings file is wrong."""
    os.umask(0o027)  # images of patients are nobody else's
    log.configure()


for command in (
    run.serve,
    run.demo,
    ask.status,
    ask.history,
    ask.audit,
    act.requeue,
    act.cancel,
    verify.verify,
    act.send,
    act.echo,
    understand.explain,
    understand.check,
    understand.export_conformance,
):
    app.command()(command)
app.add_typer(peers.app)
app.add_typer(models.app)


def main() -> None:
    """Run the command line; a deliberate error is one line on standard error, never a traceback."""
    try:
        app()
    except IllegalTransition as error:
        typer.echo(str(error), err=True)
        sys.exit(1)
    except NodeError as error:
        typer.echo(str(error), err=True)
        sys.exit(2)
