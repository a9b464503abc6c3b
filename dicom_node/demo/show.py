"""The demonstration from end to end: scanner, node, PACS, tables, picture. Only the study is not real, at most."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dicom_node.config import DeliveryTable, Peer, load
from dicom_node.delivery.cstore import Parcel, deliver, echo
from dicom_node.demo.pacs import Pacs
from dicom_node.demo.phantom import make_thorax, write_series
from dicom_node.demo.picture import draw
from dicom_node.demo.reading import Report, read_report, tables
from dicom_node.errors import NodeError, SettingsError
from dicom_node.forms import Form
from dicom_node.ledger import Ledger
from dicom_node.ledger.history import Row
from dicom_node.lifecycle import State

console = Console()

_SEG = "1.2.840.10008.5.1.4.1.1.66.4"
_COMPREHENSIVE_3D_SR = "1.2.840.10008.5.1.4.1.1.88.34"
_START_TIMEOUT = 60.0
_WORK_TIMEOUT = 900.0
_MANY = 10_000
MARK = ".dicom-node-demo"
"""A file in the output folder that says that the demonstration may empty it."""
_ENDED = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.NOT_APPLICABLE})

SETTINGS = """\
# what the demonstration ran with: the same file, with other paths and peers, is a hospital's

[node]
ae_title = "DICOM_NODE"
host = "127.0.0.1"
port = {port}
storage = "node"

[receive]
minimum_free_megabytes = 100

[peer.PACS]
ae_title = "PACS"
host = "127.0.0.1"
port = {pacs_port}
results = ["seg", "sr"]

[[route]]
name = "lungs and nodules in chest CT"
when = {{ Modality = "CT" }}
run = ["ct_lung", "ct_lung_nodule"]
send_to = "PACS"
"""


def run_demo(study: Path | None, output: Path) -> int:
    """Run it; return the exit code: 0 where every model answered and every result came back."""
    _make_room(output)
    files = _study(study, output)
    pacs = Pacs(output / "pacs")
    settings_path = output / "node.toml"
    port = _free_port()
    settings_path.write_text(SETTINGS.format(port=port, pacs_port=pacs.start()), encoding="utf-8")
    node = _start_node(settings_path, output / "node.log")
    try:
        peer = Peer(ae_title="DICOM_NODE", host="127.0.0.1", port=port)
        _wait_for(node, peer, output / "node.log")
        console.print(f"node [bold]DICOM_NODE[/bold] listens on 127.0.0.1:{port}; PACS plays the destination")
        _push(files, peer)
        ledger = Ledger(load(settings_path).ledger_url)
        follow(ledger)
        problems = missing(ledger.history.recent_jobs(limit=_MANY), ledger.history.results(limit=_MANY), pacs.kept())
        ledger.close()
        _conclude(pacs, files, output)
        for problem in problems:
            console.print(f"[red]{problem}[/red]")
        return 1 if problems else 0
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(30)
        pacs.stop()


def _make_room(output: Path) -> None:
    """Empty the folder of an earlier demonstration; raise SettingsError where it holds anything else."""
    if output.exists() and any(output.iterdir()):
        if not (output / MARK).is_file():
            raise SettingsError(f"{output} is not empty and no earlier demonstration's: name another with --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).touch()


def missing(jobs: Sequence[Row], results: Sequence[Row], kept: Collection[str]) -> list[str]:
    """Return one sentence for each job that failed, model that answered nothing and result that did not come back."""
    failed = [
        f"job {job['job_id']} ({job['kind']} {job['model']}) is {job['state']}: {job['reason']}"
        for job in jobs
        if job["state"] not in (State.DONE, State.NOT_APPLICABLE)
    ]
    models = {job["model"] for job in jobs}
    silent = models - {result["model"] for result in results}
    due = [result for result in results if result["form"] in (None, Form().key)]  # other forms are for other peers
    lost = [result for result in due if result["sop_instance_uid"] not in kept]
    return [
        *failed,
        *(f"{model} has no result" for model in sorted(silent)),
        *(f"a {result['kind']} of {result['model']} did not come back" for result in lost),
        *([] if jobs else ["no model ran"]),
    ]


def _study(study: Path | None, output: Path) -> list[Path]:
    """Return the files to push: the folder that was named, or a thorax made on the spot."""
    if study is None:
        console.print("no study named: making a thorax phantom with lungs and nodules of known size")
        return list(write_series(make_thorax(), output / "phantom"))
    files = sorted(path for path in study.rglob("*") if path.is_file() and _is_dicom(path))
    if not files:
        raise NodeError(f"{study}: no DICOM file in there")
    console.print(f"study: {len(files)} files in {study}")
    return files


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _start_node(settings_path: Path, log_path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dicom_node", "serve", "--settings", str(settings_path)]
    with log_path.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)  # noqa: S603 - ourselves


def _wait_for(node: subprocess.Popen[bytes], peer: Peer, log_path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline and node.poll() is None:
        try:
            echo(peer, ae_title="SCANNER", timing=DeliveryTable(connect_timeout=1.0))
            return
        except NodeError:
            time.sleep(0.2)
    raise NodeError(f"the node did not start; its log is {log_path}")


def _push(files: Sequence[Path], peer: Peer) -> None:
    parcels = [Parcel.of_file(path) for path in files]
    started = time.monotonic()
    with _bars() as progress:
        task = progress.add_task("C-STORE to the node", total=len(parcels))
        deliver(parcels, peer, ae_title="SCANNER", timing=DeliveryTable(), sent=lambda *_: progress.advance(task))
    seconds = time.monotonic() - started
    console.print(f"  {len(parcels)} instances acknowledged in {seconds:.1f} s: each is on stable storage")


def follow(ledger: Ledger) -> None:
    """Show each job's progress until nothing is left to do."""
    seen = 0
    tasks: dict[int, TaskID] = {}
    deadline = time.monotonic() + _WORK_TIMEOUT
    with _bars(counted=False) as progress:
        while time.monotonic() < deadline:
            # a series is complete and its jobs are queued in one step: looked at in this order, it is never between
            waiting = bool(ledger.arrivals.open_series()) or not ledger.history.recent_series(limit=1)
            jobs = ledger.history.recent_jobs(limit=_MANY)
            for event in ledger.history.events_after(seen):
                seen = event["event_id"]
                _tell(progress, event)
            for job in jobs:
                _advance(progress, tasks, job)
            if not waiting and all(job["state"] in _ENDED for job in jobs):
                return
            time.sleep(0.2)
    raise NodeError(f"the jobs did not end within {_WORK_TIMEOUT:.0f} s")


def _tell(progress: Progress, event: Row) -> None:
    reasons = {
        "series.complete": "series complete: {reason}",
        "series.unrouted": "no route for a series",
        "job.declined": "a model does not apply: {reason} ({detail})",
        "job.refused": "[red]a job failed: {reason} ({detail})[/red]",
        "job.exhausted": "[red]a job failed for good: {reason} ({detail})[/red]",
        "job.postponed": "[yellow]a job waits: {reason} ({detail})[/yellow]",
    }
    if event["name"] in reasons:
        fields = {"reason": "", "detail": "", **event["fields"]}
        progress.console.print("  " + reasons[event["name"]].format(**fields))


def _advance(progress: Progress, tasks: dict[int, TaskID], job: Row) -> None:
    number = job["job_id"]
    if number not in tasks:
        what = f"{job['model']} to {job['peer']}" if job["peer"] else f"{job['model']}"
        tasks[number] = progress.add_task(f"{job['kind']} {what}", total=1.0, state=job["state"])
    progress.update(tasks[number], completed=1.0 if job["state"] in _ENDED else job["progress"], state=job["state"])


def _bars(*, counted: bool = True) -> Progress:
    last = MofNCompleteColumn() if counted else TextColumn("{task.fields[state]}")
    return Progress(TextColumn("{task.description:<32}"), BarColumn(), last, TimeElapsedColumn(), console=console)


def _conclude(pacs: Pacs, files: Sequence[Path], output: Path) -> None:
    """Show what came back: tables, picture, files."""
    segs, documents = pacs.received(_SEG), pacs.received(_COMPREHENSIVE_3D_SR)
    reports: list[Report] = [read_report(path, segs) for path in documents]
    if not reports:
        console.print("\nno report came back; the reasons are above and in the history of the study")
        return
    for made in tables(reports):
        console.print()
        console.print(made)
    picture = output / "key-slices.png"
    draw(reports, segs, files, picture)
    console.print()
    for path in (*segs, *documents):
        console.print(f"  {path}", highlight=False, soft_wrap=True)
    console.print(f"  {picture}   [dim]key slices with overlay and boxes[/dim]", highlight=False, soft_wrap=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
