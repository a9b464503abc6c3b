"""Studies an hour: workers by the number, and two nodes in network namespaces, over PostgreSQL and Redis.

Every case starts its workers, waits until they have their models, stops them (SIGSTOP) while the backlog comes in, and
is timed by the ledger: from the first job that began to the last result that the destination has taken.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from bench import cases
from bench.measure import OURS, Figure, alternate, figure, processor_time
from bench.peers import ENVIRONMENT, Dcmtk, Node, Postgres, Sender, find, free_port, wait_for, wait_until_quiet
from bench.receive import scratch

STUB, REAL = "stub", "ct_lung"
_SLICES = 60
_CASES = {STUB: (12, _SLICES), REAL: (4, 240)}  # studies, slices of each: a network that is real wants a whole thorax
_WORKERS = (2, 4)  # beside one
_ENDED_OTHERWISE = ("failed", "cancelled", "not_applicable")
_MANIFEST = """schema = 1
name = "stub"
version = "1.0.0"
title = "Stub"
manufacturer = "bench"
licence = "MIT"
intended_use = "A network that does next to nothing: what remains is what the node itself costs."
runtime = "torchscript"
trusted = true
weights = {{ file = "net.pt", sha256 = "{sha256}" }}
[inputs.ct]
modality = ["CT"]
axes = "SPL"
[outputs]
activation = "labels"
[outputs.segments.1]
label = "Dense"
category = {{ value = "91723000", scheme = "SCT", meaning = "Anatomical Structure" }}
type = {{ value = "39607008", scheme = "SCT", meaning = "Lung" }}
colour = [240, 230, 140]
"""
_SETTINGS = """[completion]
settle = 0.5
quiet = 3.0
[jobs]
sweep = 0.2
lease = 120.0
[peer.PACS]
ae_title = "STORESCP"
host = "{host}"
port = {port}
[[route]]
name = "ct"
when = {{ Modality = "CT" }}
run = ["{model}"]
send_to = ["PACS"]
"""


class _Dense(torch.nn.Module):
    """Label 1 where a voxel is above 300 HU."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return (volume > 300.0).to(torch.float32)


def figures(*, rounds: int, quick: bool) -> list[Figure]:
    """Measure studies an hour of one to four workers and of two nodes, each against one worker of one node."""
    found = []
    with scratch() as folder:
        for model in (STUB,) if quick else (STUB, REAL):
            most, slices = _CASES[model]
            studies = 4 if quick else most
            one = Fleet(model, slices=slices)
            fleets = {OURS: one} | {f"{number} workers": replace(one, workers=number) for number in _WORKERS}
            fleets["2 nodes, 2 workers"] = replace(one, nodes=2)
            runs = {name: partial(run, fleet, folder / "fleet", studies) for name, fleet in fleets.items()}
            measured = alternate(runs, 1 if quick else min(rounds, 3))
            note = f"{studies} CT of {slices} slices; the first column is one worker of one node"
            title = f"backlog, model {model}"
            found.append(figure(measured, f"{title}: studies an hour", "", quantity="rate", better="higher", note=note))
            found.append(figure(measured, f"{title}: processor time of a study", "s", quantity="processor", note=note))
    return found


@dataclass(frozen=True)
class Fleet:
    """What runs: nodes with a ledger, a queue and a storage each, on one PostgreSQL and one Redis; workers of each."""

    model: str
    nodes: int = 1
    workers: int = 1  # of each node
    slices: int = _SLICES  # of each study


@dataclass
class _Site:
    """One node, in a network namespace of its own where there may be one, and its workers."""

    node: Node
    prefix: Sequence[str]
    address: str
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)


def run(fleet: Fleet, folder: Path, studies: int) -> dict[str, float]:
    """Return what a backlog of so many studies costs.

    "rate" is studies an hour while the workers are at it; "receiving", "nodes" and "workers" are the processor seconds
    of one study: of the nodes until all is queued, of the nodes after that, of the workers; "processor" is their sum.
    """
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        sites = _sites(stack, fleet, folder)
        for number, site in enumerate(sites):
            for worker in range(fleet.workers):
                site.workers.append(stack.enter_context(_worker(site, f"bench-{number}-{worker}")))
        nodes = [site.node.pid for site in sites]
        workers = [worker.pid for site in sites for worker in site.workers]
        wait_until_quiet(*workers)
        _signal(workers, signal.SIGSTOP)
        spent = [_processor(nodes)]
        _send_backlog(sites, fleet, folder, studies)
        spent += [_processor(nodes), _processor(workers)]
        _signal(workers, signal.SIGCONT)
        wait_for("all results to be delivered", lambda: _done(sites) == 2 * studies, seconds=900, every=0.5)
        spent += [_processor(nodes), _processor(workers)]
        rows = [row for site in sites for row in site.node.ledger.history.recent_jobs(limit=1000)]
    took = max(row["ended_at"] for row in rows) - min(row["started_at"] for row in rows)
    costs = {"receiving": spent[1] - spent[0], "nodes": spent[3] - spent[1], "workers": spent[4] - spent[2]}
    costs["processor"] = sum(costs.values())
    return {"rate": 3600 * studies / took, **{name: cost / studies for name, cost in costs.items()}}


def _processor(pids: Sequence[int]) -> float:
    return sum(map(processor_time, pids))


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def _sites(stack: ExitStack, fleet: Fleet, folder: Path) -> list[_Site]:
    folder.mkdir()
    spaces = [stack.enter_context(_namespace(number)) for number in range(fleet.nodes)] if fleet.nodes > 1 else []
    address = "*" if spaces else ""
    postgres = stack.enter_context(Postgres(folder / "postgres", address=address))
    redis = stack.enter_context(_redis(folder))
    sink = stack.enter_context(Dcmtk(folder / "sink", fork=True))
    models = _models(folder)
    sites = []
    for number in range(fleet.nodes):
        prefix, here, there = spaces[number] if spaces else ([], "127.0.0.1", "127.0.0.1")
        keys = [f'models = "{models}"', f'ledger = "{postgres.url(f"node{number}", here if spaces else "")}"']
        keys += [f'broker = "redis://{here}:{redis}/{number}"', f'ae_title = "NODE{number}"']
        settings = _SETTINGS.format(model=fleet.model, host=here, port=sink.port)
        node = Node(folder / f"node{number}", node="\n".join(keys), settings=settings, host="0.0.0.0", prefix=prefix)
        node.address = there
        sites.append(_Site(stack.enter_context(node), prefix, there))  # type: ignore[arg-type]
    return sites


def _send_backlog(sites: Sequence[_Site], fleet: Fleet, folder: Path, studies: int) -> None:
    sender = Sender(folder / "sender")
    files = cases.chest_ct(fleet.slices, 512)
    for number in range(studies):
        study = folder / "study"
        copies = cases.copies(files, study, associations=1, instances=len(files))
        site = sites[number % len(sites)]
        sender.send(site.node.port, copies.folders, host=site.address)
        shutil.rmtree(study)

    def queued() -> int:
        return sum(_jobs(site, "queued") for site in sites)

    wait_for("every study to be queued", lambda: queued() == studies, seconds=120, every=0.2)


def _jobs(site: _Site, *states: str) -> int:
    counts: Mapping[str, Mapping[str, int]] = site.node.ledger.history.counts()["jobs"]
    return sum(number for kind in counts.values() for state, number in kind.items() if state in states)


def _done(sites: Sequence[_Site]) -> int:
    """Return how many jobs have done what they should; raise RuntimeError where one never will."""
    for site in sites:
        if _jobs(site, *_ENDED_OTHERWISE):
            rows = site.node.ledger.history.recent_jobs(limit=1000)
            first = next(row for row in rows if row["state"] in _ENDED_OTHERWISE)
            raise RuntimeError(f"a job is {first['state']}: {first['detail']}")
    return sum(_jobs(site, "done") for site in sites)


@contextmanager
def _worker(site: _Site, name: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        *site.prefix,
        sys.executable,
        "-m",
        "workers",
        "--settings",
        str(site.node.settings_path),
        "--name",
        name,
    ]
    with (site.node.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


@contextmanager
def _redis(folder: Path) -> Iterator[int]:
    port = free_port()
    command = [find("redis-server"), "--port", str(port), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]
    process = subprocess.Popen([*command, "--dir", str(folder)], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def _namespace(number: int) -> Iterator[tuple[list[str], str, str]]:
    """Give what runs a command in a network namespace of its own, this machine's address for it, and its own address.

    Where it cannot be made (not root), the commands run in this one.
    """
    ip = find("ip", "iproute2")
    name, here, there = f"bench{os.getpid()}-{number}", f"10.213.{number}.1", f"10.213.{number}.2"
    outside, inside = f"bo{os.getpid() % 100000}-{number}", f"bi{os.getpid() % 100000}-{number}"
    steps = [
        ["netns", "add", name],
        ["link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name],
        ["addr", "add", f"{here}/30", "dev", outside],
        ["link", "set", outside, "up"],
        ["-n", name, "addr", "add", f"{there}/30", "dev", inside],
        ["-n", name, "link", "set", inside, "up"],
        ["-n", name, "link", "set", "lo", "up"],
    ]
    made = all(subprocess.run([ip, *step], capture_output=True).returncode == 0 for step in steps)
    try:
        yield ([ip, "netns", "exec", name], here, there) if made else ([], "127.0.0.1", "127.0.0.1")
    finally:
        subprocess.run([ip, "netns", "delete", name], capture_output=True)


def _models(folder: Path) -> Path:
    """Make a folder with the node's own models and the stub."""
    models = folder / "models"
    stub = models / STUB
    stub.mkdir(parents=True)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(_Dense()), buffer)
    content = buffer.getvalue()
    (stub / "net.pt").write_bytes(content)
    (stub / "model.toml").write_text(_MANIFEST.format(sha256=hashlib.sha256(content).hexdigest()))
    shutil.copytree(Path(__file__).parents[1] / "models" / REAL, models / REAL)
    return models
