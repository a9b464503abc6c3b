"""A PACS, a viewer and the node on this machine, with one command and without containers: `make viewer`."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template
from subprocess import Popen
from typing import Any

import follow
import ohif
from processes import LOOPBACK, CannotRun, executable, listens, plugin, process, require_free, tail
from serve import USER, ViewerServer

from dicom_node.config import load
from dicom_node.errors import NodeError
from dicom_node.ledger import Ledger
from dicom_node.secret import own_secret

HERE = Path(__file__).resolve().parent
_EVERY = 0.3  # seconds between two looks at the ledger
_STEP = 0.25  # of a job's progress, until it is told again

ABOUT = """\
Start Orthanc as the PACS, OHIF as the viewer and the node behind them, all on this machine.

A study that is pushed to Orthanc is sent on to the node; the node runs its models and sends SEG and SR back to
Orthanc; OHIF shows them, to whoever opens the address that is printed: it bears a token. Only this machine can reach
any of it. Ctrl-C ends everything.
"""
EXAMPLES = """\
examples:
  make viewer                                       the defaults
  make viewer VIEWER_ARGS="--port 8000"             another port for the page
  make viewer VIEWER_ARGS="--folder viewer-data"    keep studies and results for the next start
"""
READY = """
  viewer      {url}/?token={token}
  PACS        ORTHANC, C-STORE on 127.0.0.1:{dicom_port}
              its own pages http://127.0.0.1:{orthanc_port}, user {user}, password: the token
  node        DICOM_NODE on 127.0.0.1:{node_port}; gets every series from the PACS, sends SEG and SR back
  logs        {folder}

  push a study:
      TCP_NODELAY=1 storescu -aec ORTHANC +sd +r 127.0.0.1 {dicom_port} /folder/of/a/chest-ct
  Ctrl-C ends everything{forgets}.
"""


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return what the user wants."""
    parser = argparse.ArgumentParser(
        prog="make viewer", description=ABOUT, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--port", type=int, default=3000, help="of the viewer's page (3000)")
    add("--dicom-port", type=int, default=4242, help="of Orthanc's C-STORE: push studies here (4242)")
    add("--orthanc-port", type=int, default=8042, help="of Orthanc's own pages and REST API (8042)")
    add("--node-port", type=int, default=11112, help="of the node's C-STORE, which Orthanc calls (11112)")
    add("--folder", type=Path, help="keeps studies, results and logs; without it they are gone when this ends")
    add("--settings", type=Path, default=HERE / "node.toml", help="the node's, with $node_port and $dicom_port in it")
    add("--ohif", type=Path, default=HERE.parents[1] / ".ohif", help="where OHIF is unpacked, once (.ohif)")
    return parser.parse_args(arguments)


def orthanc_settings(
    common: Mapping[str, Any], wanted: argparse.Namespace, folder: Path, dicom_web: str, token: str
) -> dict[str, Any]:
    """Return Orthanc's settings: what holds anywhere, and what is so on this machine."""
    return {
        **common,
        "DicomPort": wanted.dicom_port,
        "HttpPort": wanted.orthanc_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: token},
        "StorageDirectory": str(folder / "orthanc"),
        "IndexDirectory": str(folder / "orthanc"),
        "Plugins": [dicom_web],
        "LuaScripts": [str(HERE / "route.lua")],
        "DicomModalities": {"node": ["DICOM_NODE", LOOPBACK, wanted.node_port]},
    }


def node_settings(template: str, wanted: argparse.Namespace) -> str:
    """Return node.toml with the ports in it."""
    return Template(template).safe_substitute(node_port=wanted.node_port, dicom_port=wanted.dicom_port)


@contextlib.contextmanager
def working_folder(named: Path | None) -> Iterator[Path]:
    """Give the folder that was named, or one that is gone afterwards."""
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="dicom-node-viewer-") as made:
        yield Path(made)


@contextlib.contextmanager
def everything(wanted: argparse.Namespace, folder: Path, token: str) -> Iterator[dict[str, Popen[bytes]]]:
    """Run Orthanc, the node and the page until the end of the block."""
    orthanc = executable("Orthanc", "orthanc")
    dicom_web = plugin("libOrthancDicomWeb.so", "orthanc-dicomweb")
    names = ("port", "dicom_port", "orthanc_port", "node_port")
    require_free({f"--{name.replace('_', '-')}": getattr(wanted, name) for name in names})
    dist = ohif.fetch(wanted.ohif)
    common = json.loads((HERE / "orthanc.json").read_text(encoding="utf-8"))
    pacs_json, node_toml = folder / "orthanc.json", folder / "node.toml"
    settings = orthanc_settings(common, wanted, folder, dicom_web, token)
    pacs_json.touch(mode=0o600)
    pacs_json.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    node_toml.write_text(node_settings(wanted.settings.read_text(encoding="utf-8"), wanted), encoding="utf-8")
    commands = {
        "orthanc": ([orthanc, str(pacs_json)], (wanted.orthanc_port, wanted.dicom_port)),
        "node": ([sys.executable, "-m", "dicom_node", "serve", "--settings", str(node_toml)], (wanted.node_port,)),
    }
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (command, ports) in commands.items():
            up = process(name, command, folder / f"{name}.log", lambda ports=ports: [listens(port) for port in ports])
            running[name] = stack.enter_context(up)
        page = ViewerServer(
            (LOOPBACK, wanted.port),
            dist=dist,
            app_config=HERE / "app-config.js",
            orthanc=(LOOPBACK, wanted.orthanc_port),
            token=token,
        )
        page.start()
        stack.callback(page.close)
        yield running


def watch(ledger: Ledger, url: str, stop: threading.Event, running: Mapping[str, Popen[bytes]], folder: Path) -> None:
    """Print what happens until `stop`; raise where a program ends by itself."""
    seen, told = ledger.history.latest_event_id(), {}
    while not stop.wait(_EVERY):
        jobs = {job["job_id"]: job for job in ledger.history.recent_jobs(limit=1000)}
        for event in ledger.history.events_after(seen):
            seen = event["event_id"]
            if text := follow.line(event, jobs.get(event["job_id"]), url):
                print(text, flush=True)
        for number, job in jobs.items():
            if job["state"] == "running" and job["progress"] >= told.get(number, 0.0) + _STEP:
                told[number] = job["progress"]
                print(follow.progress(job), flush=True)
        for name, program in running.items():
            if program.poll() is not None:
                raise CannotRun(f"{name} ended by itself; its log ends:\n{tail(folder / f'{name}.log')}")


def run(wanted: argparse.Namespace, stop: threading.Event) -> None:
    """Start everything, tell how to use it, follow it, and end it."""
    url = f"http://localhost:{wanted.port}"
    print("starting ..." if ohif.is_here(wanted.ohif) else "getting OHIF with npm (once, 50 MB) ...", flush=True)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(working_folder(wanted.folder))
        token = own_secret(folder, "viewer.token")
        running = stack.enter_context(everything(wanted, folder, token))
        with contextlib.closing(Ledger(load(folder / "node.toml").ledger_url)) as ledger:
            forgets = "" if wanted.folder else " and forgets the studies (--folder keeps them)"
            said = {"url": url, "folder": folder, "forgets": forgets, "token": token, "user": USER}
            print(READY.format(**{**vars(wanted), **said}), flush=True)
            watch(ledger, url, stop, running, folder)
        print("ending ...", flush=True)


def main() -> int:
    """Run until Ctrl-C; return the exit code."""
    wanted, stop = options(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    try:
        run(wanted, stop)
    except (CannotRun, ohif.CannotFetch, NodeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("everything has ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
