"""Understand: which routes match a file and why not, and whether everything that the settings name is there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dicom_node.attributes import read_attributes, says_who
from dicom_node.cli.console import JsonOption, SettingsOption, console, print_json, settings_from, table
from dicom_node.config import Settings
from dicom_node.delivery.cstore import echo
from dicom_node.errors import NodeError
from dicom_node.ledger import Ledger
from dicom_node.routing import Attributes, Mismatch, Route, mismatches
from dicom_node.tls import server_context


def explain(
    files: Annotated[list[Path], typer.Argument(help="DICOM files, one of each series is enough.")],
    calling: Annotated[str, typer.Option(help="AE title that would send them.")] = "",
    settings: SettingsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which routes match a file, which do not, and why. Exits with 1 where none matches any file."""
    routes = settings_from(settings).routes
    answers = [{"file": str(path), "routes": _explained(routes, read_attributes(path, calling))} for path in files]
    if as_json:
        print_json(answers)
    else:
        for answer in answers:
            _show(answer)
    matched = any(route["matches"] for answer in answers for route in answer["routes"])
    raise typer.Exit(0 if matched else 1)


def _explained(routes: tuple[Route, ...], attributes: Attributes) -> list[Any]:
    return [
        {
            "route": route.name,
            "matches": not mismatches(route, attributes),
            "run": route.run,
            "send_to": route.send_to,
            "because": [
                {"key": miss.key, "wanted": miss.wanted, "found": _shown(miss)}
                for miss in mismatches(route, attributes)
            ],
        }
        for route in routes
    ]


def _shown(miss: Mismatch) -> str:
    """Return what was found, but not who the patient is: output is pasted into mails and tickets."""
    return "[withheld]" if miss.found and says_who(miss.key) else miss.found


def _show(answer: Any) -> None:
    console.print(f"[bold]{answer['file']}[/bold]")
    if not answer["routes"]:
        console.print("  there is no [[route]] in the settings")
    for route in answer["routes"]:
        if route["matches"]:
            target = f"run {', '.join(route['run'])}, send to {', '.join(route['send_to'])}"
            console.print(f"  [green]matches[/green]  {route['route']}: {target}")
            continue
        console.print(f"  [yellow]no match[/yellow] {route['route']}:")
        for miss in route["because"]:
            found = f'is "{miss["found"]}"' if miss["found"] else "is absent or empty"
            console.print(f'           {miss["key"]} {found}, the route wants "{miss["wanted"]}"', highlight=False)


def check(settings: SettingsOption = None, as_json: JsonOption = False) -> None:
    """Check settings, models, storage, ledger, broker, certificates and peers; advise where more safety is to be had.

    Exits with 1 where something is wrong.
    """
    from dicom_node.cli.advising import advice  # with the broker's client, which no other command waits for

    loaded = settings_from(settings)
    findings = [(what, _outcome(test)) for what, test in _tests(loaded)]
    better = list(advice(loaded, settings))
    if as_json:
        lines = [{"what": what, "problem": problem, "advice": None} for what, problem in findings]
        print_json(lines + [{"what": what, "problem": None, "advice": text} for what, text in better])
    else:
        rows = [[what, f"[red]{problem}[/red]" if problem else "[green]fine[/green]"] for what, problem in findings]
        rows += [[what, f"[yellow]{escape(text)}[/yellow]"] for what, text in better]
        console.print(table("Check", ["what", "how"], rows))
    raise typer.Exit(1 if any(problem for _, problem in findings) else 0)


def _tests(settings: Settings) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "settings", lambda: settings
    for name in settings.catalogue():
        yield f"model {name}", lambda: None  # its manifest was read with the catalogue
    yield "labelling", lambda: _require_fonts(settings)
    yield "storage", lambda: _require_storage(settings)
    yield "ledger", lambda: Ledger(settings.ledger_url, migrate=True).close()
    if settings.node.broker:
        from dicom_node.broker import require_answer

        yield "broker", lambda: require_answer(settings)
    if settings.tls.is_on:
        yield "tls", lambda: server_context(settings.tls)
    for name, peer in settings.peer.items():
        yield (
            f"peer {name}",
            lambda peer=peer: echo(peer, ae_title=settings.node.ae_title, timing=settings.delivery),  # type: ignore[misc]
        )


def _outcome(test: Callable[[], object]) -> str | None:
    try:
        test()
    except NodeError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def _require_fonts(settings: Settings) -> None:
    from dicom_node.results.typeface import undrawable  # here: whoever serves needs none of it

    missing = undrawable(settings.labelling.disclaimer)
    if missing:
        raise NodeError(
            f"labelling.disclaimer: no font here has {missing} for the summary picture: "
            "apt-get install fonts-noto-core fonts-noto-cjk"
        )


def _require_storage(settings: Settings) -> None:
    settings.node.storage.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.node.storage).free / 1e6
    if free < settings.receive.minimum_free_megabytes:
        raise NodeError(f"{free:.0f} MB free, below receive.minimum_free_megabytes: C-STORE is answered 0xA700")


def export_conformance() -> None:
    """Print the DICOM conformance statement of this version (PS3.2 Annex N)."""
    from dicom_node.conformance import statement  # here: whoever serves needs none of it

    typer.echo(statement(), nl=False)
