"""Models: which there are, whether they are what they say, and how they are installed."""

from __future__ import annotations

import typer

from dicom_node.cli.checking import check

app = typer.Typer(name="models", help="Which models there are; check one; install one's weights.", no_args_is_help=True)
app.command()(check)
