"""Those who are measured: the node and what else would receive, each a real process on a port of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bench.measure import OURS, Absent, processor_time
from dicom_node.config import load
from dicom_node.ledger import Ledger

_SYSTEM = "/usr/sbin:/usr/bin:/usr/local/bin"  # before the environment: pynetdicom installs a storescu of its own
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}
"""Of every DCMTK tool: with Nagle's algorithm on, delayed acknowledgements are all that is measured."""


def find(tool: str, package: str = "") -> str:
    """Return the path of a program; raise Absent where it is not installed."""
    found = shutil.which(tool, path=f"{_SYSTEM}:{os.environ.get('PATH', '')}")
    if found is None:
        raise Absent(f"{tool} is not installed (apt-get install {package or tool})")
    return found


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], *, seconds: float = 60.0, every: float = 0.02) -> None:
    """Wait until something is true; raise TimeoutError with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(every)


class Receiver:
    """A Storage SCP in processes of its own, in a folder of its own; a context manager."""

    name = ""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which is made."""
        folder.mkdir(parents=True)
        self.folder = folder
        self.address = "127.0.0.1"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def command(self) -> Sequence[str]:
        """Return what is run; raise Absent where it cannot be."""
        raise NotImplementedError

    def stored(self) -> int:
        """Return how many instances are stored and on record."""
        raise NotImplementedError

    def clear(self) -> None:
        """Delete what is stored, as far as the receiver does not mind, so that its disk space is free again."""

    @property
    def pid(self) -> int:
        """Return the number of the first process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Receiver:
        """Start, and wait until it listens and has nothing more to do."""
        self._log = (self.folder / "log").open("wb")
        self._process = subprocess.Popen(
            self.command(), stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL, env=ENVIRONMENT
        )
        try:
            wait_for(f"{self.name} to listen", self._listens, seconds=240)
            wait_until_quiet(self.pid)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End it."""
        assert self._process is not None
        assert self._log is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _listens(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended at once: see {self.folder / 'log'}")
        with suppress(OSError), socket.create_connection((self.address, self.port), timeout=1.0):
            return True
        return False


def wait_until_quiet(*pids: int) -> None:
    """Wait until a second costs each process less than a tenth of processor time: what it imports is not measured."""
    for _ in range(120):
        before = [processor_time(pid) for pid in pids]
        time.sleep(1.0)
        if all(processor_time(pid) - earlier < 0.1 for pid, earlier in zip(pids, before, strict=True)):
            return


class Dcmtk(Receiver):
    """DCMTK's storescp: one process, or one for each association; it writes and does not sync."""

    name = "DCMTK storescp"

    def __init__(self, folder: Path, *, fork: bool = False) -> None:
        """With `fork`, associations are received at the same time."""
        super().__init__(folder)
        self._received = folder / "received"
        self._received.mkdir()
        self._fork = ["--fork"] if fork else []

    def command(self) -> Sequence[str]:
        """Return storescp with its defaults."""
        return [find("storescp", "dcmtk"), *self._fork, "-od", str(self._received), str(self.port)]

    def stored(self) -> int:
        """Count the files."""
        return sum(1 for _ in os.scandir(self._received))

    def clear(self) -> None:
        """Delete the files."""
        _empty(self._received)


class SyncingDcmtk(Dcmtk):
    """DCMTK's storescp with `syncing.c` before its C library: it acknowledges what is on stable storage."""

    name = "DCMTK made to sync"

    def command(self) -> Sequence[str]:
        """Return storescp with the library, which is compiled."""
        library = self.folder / "syncing.so"
        compiler = find("cc", "gcc")
        source = Path(__file__).with_name("syncing.c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
        return ["env", f"LD_PRELOAD={library}", *super().command()]


class StockPynetdicom(Dcmtk):
    """pynetdicom as its documentation shows it: a handler that writes the encoded data set to a file."""

    name = "stock pynetdicom"

    def command(self) -> Sequence[str]:
        """Return the script in `bench/stock_pynetdicom.py`."""
        script = Path(__file__).with_name("stock_pynetdicom.py")
        return [sys.executable, str(script), str(self._received), str(self.port)]


class Orthanc(Receiver):
    """Debian's Orthanc with SQLite, without plugins."""

    name = "Orthanc"

    def command(self) -> Sequence[str]:
        """Return Orthanc with a configuration that checks nothing and keeps everything."""
        executable = find("Orthanc", "orthanc")
        settings = {
            "StorageDirectory": str(self.folder / "db"),
            "IndexDirectory": str(self.folder / "db"),
            "DicomPort": self.port,
            "HttpServerEnabled": False,
            "DicomAlwaysAllowStore": True,
            "DicomCheckCalledAet": False,
            "DicomThreadsCount": 32,
            "Plugins": [],
        }
        path = self.folder / "orthanc.json"
        path.write_text(json.dumps(settings))
        return [executable, str(path)]

    def stored(self) -> int:
        """Count the files; Orthanc makes one for the instance and may make one for its header."""
        return sum(
            1
            for path in (self.folder / "db").glob("??/??/*")
            if path.is_file() and path.read_bytes()[128:132] == b"DICM"
        )

    def clear(self) -> None:
        """Keep them: Orthanc's index knows them."""


class Node(Receiver):
    """This node, as `dicom-node serve`, with everything that makes an acknowledged instance durable; no routes."""

    name = OURS

    def __init__(
        self,
        folder: Path,
        *,
        node: str = "",
        settings: str = "",
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> None:
        """Use `folder` for storage and ledger; `node` is added to that table of node.toml, `settings` to its end.

        `prefix` comes before the command, such as what runs it in a network namespace.
        """
        super().__init__(folder)
        self._prefix = prefix
        self.settings_path = folder / "node.toml"
        self.settings_path.write_text(
            f'[node]\nhost = "{host}"\nport = {self.port}\nstorage = "storage"\n{node}\n'
            f"[receive]\nminimum_free_megabytes = 100\nmaximum_instance_megabytes = 4096\n{settings}"
        )
        self._ledger: Ledger | None = None
        self._forgotten = 0

    def command(self) -> Sequence[str]:
        """Return `dicom-node serve`."""
        return [*self._prefix, sys.executable, "-m", "dicom_node", "serve", "--settings", str(self.settings_path)]

    @property
    def ledger(self) -> Ledger:
        """Return its ledger, to read."""
        if self._ledger is None:
            self._ledger = Ledger(load(self.settings_path).ledger_url)
        return self._ledger

    def stored(self) -> int:
        """Ask the ledger."""
        return int(self.ledger.history.counts()["instances"]) - self._forgotten

    def clear(self) -> None:
        """Delete the files; the ledger keeps its rows, and what follows is another study."""
        self._forgotten = int(self.ledger.history.counts()["instances"])
        _empty(self.folder / "storage" / "studies")

    def __exit__(self, *about: Any) -> None:
        """End it."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
        super().__exit__(*about)


class NodeOfTwo(Node):
    """The same with two processes that receive."""

    name = "2 processes"

    def __init__(self, folder: Path) -> None:
        """Use `folder` for storage and ledger."""
        super().__init__(folder, settings="processes = 2\n")


def _empty(folder: Path) -> None:
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


class Postgres:
    """A PostgreSQL server of its own with its defaults, on a Unix socket and on `address`; a context manager."""

    def __init__(self, folder: Path, *, address: str = "") -> None:
        """Keep data in `folder`, which is made; `address` is what to listen on besides the socket."""
        self._bin = _postgres_programs()
        self._runner: list[str] = []
        folder.mkdir(parents=True)
        if os.geteuid() == 0:
            self._runner = [find("runuser", "util-linux"), "-u", "postgres", "--"]
            shutil.chown(folder, "postgres")
        self.port = free_port()
        self._address = address
        self._data = folder / "data"
        self._socket = Path(tempfile.mkdtemp(prefix="bench-pg-"))  # a socket's path may have 107 bytes
        if self._runner:
            shutil.chown(self._socket, "postgres")

    def __enter__(self) -> Postgres:
        """Make a cluster and start it."""
        self._run("initdb", "-D", str(self._data), "-U", "node", "-A", "trust", "-E", "UTF8")
        options = f"-c listen_addresses='{self._address}' -c port={self.port} -c max_connections=200"
        options += f" -c unix_socket_directories={self._socket}"
        if self._address:
            (self._data / "pg_hba.conf").open("a").write("host all all 0.0.0.0/0 trust\n")
        self._run("pg_ctl", "-D", str(self._data), "-w", "-l", str(self._data / "log"), "-o", options, "start")
        return self

    def __exit__(self, *about: object) -> None:
        """End it and delete it."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "stop")
        shutil.rmtree(self._data, ignore_errors=True)
        shutil.rmtree(self._socket, ignore_errors=True)

    def url(self, name: str, host: str = "") -> str:
        """Make an empty database; return its URL, by the socket or by an address."""
        self._run("createdb", "-h", str(self._socket), "-p", str(self.port), "-U", "node", name)
        if host:
            return f"postgresql+psycopg://node@{host}:{self.port}/{name}"
        return f"postgresql+psycopg://node@/{name}?host={self._socket}&port={self.port}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._runner, str(self._bin / program), *arguments]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise Absent("PostgreSQL is not installed (apt-get install postgresql)")
    return found[-1].parent


# -- those who send -----------------------------------------------------------------------------------------------

_LAYOUT = """log4cplus.rootLogger = INFO, console
log4cplus.appender.console = log4cplus::ConsoleAppender
log4cplus.appender.console.layout = log4cplus::PatternLayout
log4cplus.appender.console.layout.ConversionPattern = %D{%s.%q} %m%n
"""
_LINE = re.compile(
    r"^(\d+\.\d+) (Requesting Association|Releasing Association|Received Store Response \(Success\))", re.M
)


@dataclass(frozen=True, slots=True)
class Sent:
    """What DCMTK's storescu saw: `began` when the first association was asked for, `ended` when the last was released.

    Its own start, and its looking through the files, are not in it.
    """

    began: float  # seconds since the epoch
    ended: float
    acknowledged: int

    @property
    def seconds(self) -> float:
        """Return how long it took."""
        return self.ended - self.began


class Sender:
    """DCMTK's storescu, one process for each association, all at once."""

    def __init__(self, folder: Path) -> None:
        """Keep its logs in `folder`, which is made."""
        self._executable = find("storescu", "dcmtk")
        folder.mkdir(parents=True)
        self._folder = folder
        self._layout = folder / "layout.cfg"
        self._layout.write_text(_LAYOUT)

    def start(self, port: int, path: Path, number: int = 0, host: str = "127.0.0.1") -> subprocess.Popen[bytes]:
        """Start to send a folder or a file on one association."""
        command = [self._executable, "-lc", str(self._layout), "-aec", "DICOM_NODE", "+sd", "+r"]
        with (self._folder / f"{number}.log").open("wb") as log:
            return subprocess.Popen([*command, host, str(port), str(path)], stdout=log, stderr=log, env=ENVIRONMENT)

    def send(self, port: int, folders: Sequence[Path], *, host: str = "127.0.0.1", timeout: float = 600.0) -> Sent:
        """Send each folder on an association of its own; return when all have ended. Raises where one failed."""
        processes = [self.start(port, folder, number, host) for number, folder in enumerate(folders)]
        deadline = time.monotonic() + timeout
        for process in processes:
            if process.wait(max(1.0, deadline - time.monotonic())) != 0:
                raise RuntimeError(f"storescu failed: see {self._folder}")
        return self.sent(len(folders))

    def sent(self, number: int) -> Sent:
        """Read the logs of associations 0 to `number` - 1."""
        lines = [match for each in range(number) for match in _LINE.findall((self._folder / f"{each}.log").read_text())]
        return Sent(
            began=min(float(at) for at, what in lines if what.startswith("Requesting")),
            ended=max(float(at) for at, what in lines if what.startswith("Releasing")),
            acknowledged=sum(what.startswith("Received") for _, what in lines),
        )
