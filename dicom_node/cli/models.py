"""Models: which there are, whether they are what they say, and how their weights are installed."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from dicom_node.catalogue import ModelFolder, read_catalogue, read_model
from dicom_node.cli.checking import check, folder_of
from dicom_node.cli.console import JsonOption, SettingsOption, console, print_json, settings_from, table
from dicom_node.conversion import CONVERTERS
from dicom_node.errors import ModelRefused, SettingsError
from dicom_node.fetching import digest_of, fetch
from dicom_node.manifest import PublishedFile, Weights

app = typer.Typer(name="models", help="Which models there are; check one; install one's weights.", no_args_is_help=True)
app.command()(check)


@app.command(name="list")
def list_models(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """List the models of the settings' models folder, and whether their files are installed."""
    found = read_catalogue(settings_from(settings).node.models)
    rows = [
        {
            "name": name,
            "version": model.manifest.version,
            "title": model.manifest.title,
            "runtime": model.manifest.runtime,
            "trusted": model.manifest.trusted,
            "licence": model.manifest.licence,
            "digest": model.digest,
            "missing": [weights.file for weights in model.manifest.weights if not _is_there(model.folder, weights)],
        }
        for name, model in found.items()
    ]
    if as_json:
        print_json(rows)
        return
    columns = ["name", "version", "title", "runtime", "licence", "files"]
    shown = [[*(row[key] for key in columns[:-1]), _files(row["name"], row["missing"])] for row in rows]
    console.print(table("Models", columns, shown))


def _files(name: object, missing: object) -> str:
    return f"[yellow]missing: dicom-node models add {name}[/yellow]" if missing else "[green]installed[/green]"


def _is_there(folder: Path, weights: Weights) -> bool:
    if not weights.distribution:
        return (folder / weights.file).is_file()
    try:
        place = importlib.metadata.distribution(weights.distribution).locate_file(weights.file)
    except importlib.metadata.PackageNotFoundError:
        return False
    return Path(str(place)).is_file()


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="A model whose manifest says where its files were published.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="Take the published files from this folder, not from the network.")
    ] = None,
    settings: SettingsOption = None,
) -> None:
    """Install a model's files: fetched from where they were published, verified, converted where need be.

    Nothing is installed whose digest is not the manifest's.
    """
    model = read_model(folder_of(settings_from(settings), name))
    with tempfile.TemporaryDirectory(dir=model.folder, prefix=".adding-") as scratch:
        if model.manifest.origin is not None:
            published = _gathered(model.manifest.origin.files, source, Path(scratch))
            contents = {path.name: path.read_bytes() for path in published}
            made = Path(scratch) / "made"
            made.write_bytes(CONVERTERS[model.manifest.origin.converter](contents))
            _install(model, model.manifest.weights[0], made)
        else:
            _add_as_they_are(model, source, Path(scratch))
    console.print(f"{name} {model.manifest.version} is installed; `dicom-node models check {name}` tries it")


def _add_as_they_are(model: ModelFolder, source: Path | None, scratch: Path) -> None:
    wanted = [weights for weights in model.manifest.weights if not _is_there(model.folder, weights)]
    for weights in wanted:
        if weights.distribution:
            raise SettingsError(f"{weights.file} comes with a package: pip install {weights.distribution}")
        if not weights.url and source is None:
            raise SettingsError(f"{weights.file}: the manifest has no url; put it there by hand, or say --from FOLDER")
    files = [PublishedFile.model_construct(file=one.file, url=one.url, sha256=one.sha256) for one in wanted]
    for weights, path in zip(wanted, _gathered(files, source, scratch), strict=True):
        _install(model, weights, path)


def _gathered(files: Sequence[PublishedFile], source: Path | None, scratch: Path) -> list[Path]:
    """Return the published files, each with the digest that the manifest names."""
    if source is not None:
        return [_verified(source / file.file, file.sha256) for file in files]
    paths = [scratch / Path(file.file).name for file in files]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console)
    with bar:
        for file, path in zip(files, paths, strict=True):
            fetch(file.url, path, file.sha256, _follow(bar, file.file))
    return paths


def _follow(bar: Progress, name: str) -> Callable[[int, int], None]:
    task = bar.add_task(name, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total or None)


def _verified(path: Path, sha256: str) -> Path:
    if not path.is_file():
        raise SettingsError(f"{path}: no such file")
    if digest_of(path) != sha256:
        raise ModelRefused(f"{path} is not the file that the manifest names (sha256)")
    return path


def _install(model: ModelFolder, weights: Weights, made: Path) -> None:
    """Put a file in its place in one step, if it is the one that the manifest names."""
    if digest_of(made) != weights.sha256:
        raise ModelRefused(f"{weights.file}: what was made is not what the manifest names (sha256 {digest_of(made)})")
    target = model.folder / weights.file
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(made, part)
    os.replace(part, target)
