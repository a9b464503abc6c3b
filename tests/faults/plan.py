"""The long plan: studies from several scanners for many minutes, while at random moments whatever can break does.

    python -m tests.faults.plan --minutes 20 --seed 1
    python -m tests.faults.plan --minutes 20 --seed 2 --ledger postgresql --broker redis

Processes of the node, its broker and its ledger are killed, the disk is filled (a tmpfs of its own where root may mount
one), the broker is flushed and told everything twice, the destination goes away, hangs and comes back. Afterwards every
promise is checked. What came of it is printed; the exit code is 0 where nothing was lost, missing or doubled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path

from pydicom import Dataset, dcmread

from dicom_node.broker import connect
from dicom_node.config import load
from tests.acceptance.stand import NodeProcess, OrthancProcess, free_port, wait_for
from tests.conftest import find_tool
from tests.faults import promises
from tests.faults.archive import Archive
from tests.faults.conftest import MODEL, write_model, write_studies
from tests.faults.keeper import Keeper
from tests.faults.scanner import Acknowledged, Image, Scanner
from tests.faults.servers import PostgreSQL, Redis, double, flush

DISK, DISK_EACH_MINUTE = 128, 64  # MiB of the disk that is filled: what is received has to fit in
BACKLOG = 6  # studies that a scanner is ahead of the results, at the most


class Plan:
    """One run: a node, its neighbours, scanners, and blows."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.chance = random.Random(options.seed)
        self.blows: Counter[str] = Counter()
        self._undo: list[Callable[[], object]] = []
        self._begin = time.monotonic()
        self.made: list[list[Image]] = []
        self._lock = threading.Lock()
        self.acknowledged: dict[str, Acknowledged] = {}
        self.refused: Counter[int] = Counter()
        self._over = threading.Event()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    # -- what there is ----------------------------------------------------------------------------------------

    def _build(self) -> None:
        models = write_model(self.folder / "models")
        executable = find_tool("Orthanc") if self.options.archive == "orthanc" else None
        self.orthanc = self.archive = None
        if executable:
            self.orthanc = OrthancProcess(
                executable, self.folder / "orthanc", dicom_port=free_port(), http_port=free_port()
            )
            self.orthanc.start()
            self._undo.append(self.orthanc.stop)
        else:
            self.archive = Archive().start()
            self._undo.append(self.archive.stop)
        lines = [f'models = "{models}"']
        self.postgresql = self.redis = None
        if self.options.ledger == "postgresql":
            self.postgresql = PostgreSQL()
            self._undo.append(self.postgresql.end)
            lines.append(f'ledger = "{self.postgresql.url}"')
        if self.options.broker == "redis":
            self.redis = Redis(find_tool("redis-server") or "redis-server", self.folder)
            self._undo.append(self.redis.kill)
            lines.append(f'broker = "{self.redis.url}"')
        self.running = NodeProcess(
            self.folder / "node",
            pacs_port=self.orthanc.dicom_port if self.orthanc else self.archive.port,
            node="\n".join(lines),
            quiet=10.0,
            lease=10.0,
        )
        self._undo.append(self.running.end)
        self.storage = self.running.folder / "storage"
        self.storage.mkdir()
        self.has_own_disk = self._mount()
        self.running.start()
        self.workers: list[Worker] = []
        if self.redis:
            self.workers = [Worker(self.running, self.folder, number) for number in range(2)]
            self._undo += [worker.end for worker in self.workers]
        self.keeper = Keeper(self.running)
        self._undo.append(self.keeper.end)

    def _mount(self) -> bool:
        if os.geteuid() != 0 or not self.options.own_disk:
            return False
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.options.disk}m,mode=0755", "tmpfs", str(self.storage)]
        if subprocess.run(command, capture_output=True).returncode:
            return False
        self._undo.insert(0, lambda: subprocess.run(["umount", "-l", str(self.storage)], check=False))
        return True

    def close(self) -> None:
        """End everything that was started, the last first."""
        self._over.set()
        for undo in reversed(self._undo):
            with contextlib.suppress(Exception):
                undo()

    # -- who sends --------------------------------------------------------------------------------------------

    def scan(self, number: int) -> None:
        """Send studies until the time is over; then what is left of the last one."""
        chance = random.Random(f"{self.options.seed} {number}")
        for study in range(100_000):
            if self._over.is_set():
                return
            first = 10_000 * (number + 1) + study
            [images] = write_studies(self.folder / "studies" / str(number), 1, first=first)
            with self._lock:
                self.made.append(images)
            scanner = Scanner(self.running.port, [images], chance=chance, name=f"SCANNER{number}")
            scanner.start()
            scanner.join()
            with self._lock:
                self.acknowledged |= scanner.acknowledged
                self.refused.update(scanner.refused)
            while not self._over.wait(chance.uniform(0.2, 2.0)) and self._backlog() > BACKLOG:
                pass

    def _backlog(self) -> int:
        try:
            done = sum(job["kind"] == "deliver" and job["state"] == "done" for job in self.running.jobs())
        except Exception:  # the ledger is away: that is the plan
            return 0
        return len(self.made) - done

    # -- what breaks ------------------------------------------------------------------------------------------

    def possible(self) -> list[Callable[[], None]]:
        """Return the blows that this machine and these settings allow."""
        blows = [self.kill_node, self.stop_node, self.kill_inferring, self.kill_delivering, self.freeze_a_worker]
        blows += [self.flush_broker, self.double_messages, self.kill_broker, self.bounce_destination]
        blows += [self.hang_destination] if self.orthanc else []
        blows += [self.fill_disk] if self.has_own_disk else []
        blows += [self.crash_ledger, self.restart_ledger] if self.postgresql else [self.lock_ledger]
        return blows

    def strike(self, until: float) -> None:
        """Let blows fall at random moments; each kind at least once where there is time."""
        blows = self.possible()
        first = self.chance.sample(blows, len(blows))
        while time.monotonic() < until:
            time.sleep(min(self.chance.uniform(0.5, self.options.calm), max(0.0, until - time.monotonic())))
            blow = first.pop() if first else self.chance.choice(blows)
            self.blows[blow.__name__.replace("_", " ")] += 1
            blow()

    def kill_node(self) -> None:
        self.running.process.kill()

    def stop_node(self) -> None:
        self.running.process.send_signal(signal.SIGTERM)

    def kill_inferring(self) -> None:
        self._kill_worker("--queue infer", 0)

    def kill_delivering(self) -> None:
        self._kill_worker("--queue deliver", 1)

    def _kill_worker(self, word: str, number: int) -> None:
        if self.workers:
            self.workers[number].kill()
        else:
            self.running.kill_children(word)

    def freeze_a_worker(self) -> None:
        """Longer than its lease: another one gets its job, and what it then wants to record is refused."""
        pids = self.running.children_pids("-m workers")
        frozen = self.chance.sample(pids, 1) if pids else []
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(self.chance.choice([2.0, 14.0]) if self.options.minutes > 3 else 2.0)
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    @property
    def _broker(self):
        return self.redis.client if self.redis else connect(load(self.running.settings_path))

    def flush_broker(self) -> None:
        flush(self._broker)

    def double_messages(self) -> None:
        double(self._broker)

    def kill_broker(self) -> None:
        if self.redis:
            self.redis.kill()
            time.sleep(self.chance.uniform(0.1, 5.0))
            self.redis.start()
        else:
            self.running.kill_children("valkey-server")

    def bounce_destination(self) -> None:
        away = self.orthanc or self.archive
        away.stop()
        time.sleep(self.chance.uniform(0.5, 8.0))
        away.start()

    def hang_destination(self) -> None:
        self.orthanc.signal(signal.SIGSTOP)
        time.sleep(self.chance.uniform(1.0, 8.0))
        self.orthanc.signal(signal.SIGCONT)

    def fill_disk(self) -> None:
        """Fill it to the last byte, for a while."""
        ballast = self.storage / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
        time.sleep(self.chance.uniform(1.0, 10.0))
        ballast.unlink(missing_ok=True)

    def lock_ledger(self) -> None:
        """Hold SQLite's lock, sometimes for longer than the node waits for it."""
        seconds = self.chance.choice([1.0, 4.0, 18.0] if self.options.minutes > 3 else [1.0, 4.0])
        with contextlib.suppress(sqlite3.Error):
            connection = sqlite3.connect(self.storage / "ledger.sqlite3", timeout=5, isolation_level=None)
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            connection.rollback()
            connection.close()

    def crash_ledger(self) -> None:
        self._restart_postgresql("immediate")

    def restart_ledger(self) -> None:
        self._restart_postgresql("fast")

    def _restart_postgresql(self, mode: str) -> None:
        self.postgresql.stop(mode)
        time.sleep(self.chance.uniform(0.1, 6.0))
        self.postgresql.start()

    # -- the whole --------------------------------------------------------------------------------------------

    def run(self) -> dict[str, object]:
        """Do it; return what came of it. Raises AssertionError where a promise was broken."""
        scanners = [
            threading.Thread(target=self.scan, args=(number,), daemon=True) for number in range(self.options.scanners)
        ]
        for scanner in scanners:
            scanner.start()
        self.strike(time.monotonic() + 60.0 * self.options.minutes)
        self._over.set()
        for scanner in scanners:
            scanner.join(180)
        assert not any(scanner.is_alive() for scanner in scanners), f"not acknowledged\n{self.running.log()[-4000:]}"
        calm = time.monotonic()
        promises.wait_until_settled(self.running, self.made, models=[MODEL], seconds=600)
        settled = time.monotonic() - calm
        self.keeper.end()
        wait_for("the node to answer", self.running.answers, seconds=60)
        received = self.received()
        promises.all_kept(self.running, self.acknowledged, received, self.made, models=[MODEL])
        return self.report(received, settled)

    def received(self) -> list[Dataset]:
        """Return every result object that the destination holds."""
        if self.archive:
            promises.same_bytes(self.archive.received)
            return [each.dataset() for each in self.archive.holds().values()]
        return [dcmread(BytesIO(content)) for modality in ("SEG", "SR") for content in self.orthanc.files_of(modality)]

    def report(self, received: Sequence[Dataset], settled: float) -> dict[str, object]:
        """Return what a person wants to know."""
        jobs = self.running.jobs()
        return {
            "seed": self.options.seed,
            "ledger, broker, destination": f"{self.options.ledger}, {self.options.broker}, "
            f"{'Orthanc' if self.orthanc else 'scripted peer'}",
            "minutes": round((time.monotonic() - self._begin) / 60, 1),
            "blows": dict(self.blows.most_common()),
            "lives of the node": self.keeper.lives,
            "studies sent": len(self.made),
            "instances acknowledged": len(self.acknowledged),
            "answers that were not success": {f"0x{status:04X}": count for status, count in self.refused.items()},
            "results at the destination": dict(Counter(str(each.Modality) for each in received)),
            "jobs": dict(Counter(f"{job['kind']} {job['state']}" for job in jobs)),
            "attempts at one job, at most": max(job["attempts"] for job in jobs),
            "seconds until all was delivered": round(settled, 1),
            "defects in the log": self.running.log().count("defect"),
            "instances lost, results missing, results doubled": "0, 0, 0",
        }


class Worker:
    """`dicom-node-worker`, started again whenever it ends."""

    def __init__(self, running: NodeProcess, folder: Path, number: int) -> None:
        self._command = [sys.executable, "-m", "workers", "--settings", str(running.settings_path)]
        self._log = folder / f"worker{number}.log"
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._ended.is_set():
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            while self._process.poll() is None and not self._ended.wait(0.1):
                pass
            self._ended.wait(0.2)
        self._process.kill()
        self._process.wait(10)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scanners", type=int, default=3)
    parser.add_argument("--calm", type=float, default=8.0, help="seconds between two blows, at most")
    parser.add_argument("--ledger", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--broker", choices=["embedded", "redis"], default="embedded")
    parser.add_argument("--archive", choices=["orthanc", "scripted"], default="orthanc")
    parser.add_argument("--disk", type=int, help="MiB of the disk that is filled; by default as the minutes need")
    parser.add_argument("--no-own-disk", dest="own_disk", action="store_false", help="mount no tmpfs; fill no disk")
    parser.add_argument("--folder", type=Path, help="work here and leave it all behind")
    options = parser.parse_args(arguments)
    options.disk = options.disk or DISK + int(DISK_EACH_MINUTE * options.minutes)
    return options


@contextlib.contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[Path]:
    """Give the folder to work in; one that nobody asked for is gone afterwards."""
    if options.folder:
        options.folder.mkdir(parents=True)
        yield options.folder.absolute()
        return
    made = Path(tempfile.mkdtemp(prefix="dicom-node-plan-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def main() -> int:
    """Run the plan that the command line asks for."""
    options = parse()
    with folder_of(options) as folder:
        plan = Plan(options, folder)
        try:
            for what, value in plan.run().items():
                print(f"{what}: {value}", flush=True)
        except AssertionError as error:
            print(f"BROKEN PROMISE, seed {options.seed}: {error}", file=sys.stderr)
            return 1
        finally:
            plan.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
