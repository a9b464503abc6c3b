"""What a malicious model tries, as Python that can be hidden wherever a format runs code."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_SOURCE = """
import ctypes, json, os, resource, socket, subprocess, sys
place = {place!r}
def connect(family, address):
    with socket.socket(family) as one:
        one.settimeout(5)
        one.connect(address)
def fork():
    if not os.fork():
        os._exit(0)
def raw(number, *arguments):
    if ctypes.CDLL(None, use_errno=True).syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "refused")
tries = dict(
    command=lambda: subprocess.run(["touch", place + "/command"], check=True),
    shell=lambda: 1 / (os.system("touch " + place + "/shell") == 0),
    executed=lambda: os.execv("/bin/true", ["true"]) if {severe} else None,
    forked=fork,
    tcp=lambda: connect(socket.AF_INET, ("127.0.0.1", {port})),
    unix=lambda: connect(socket.AF_UNIX, place + "/socket"),
    read_spool=lambda: open(place + "/storage/spool/1.dcm").read(),
    read_key=lambda: open(place + "/home/.ssh/id_ed25519").read(),
    list_storage=lambda: os.listdir(place + "/storage"),
    change_ledger=lambda: open(place + "/storage/ledger.sqlite3", "r+b"),
    empty_ledger=lambda: os.truncate(place + "/storage/ledger.sqlite3", 6),
    lock_ledger=lambda: os.chmod(place + "/storage/ledger.sqlite3", 0o640),
    touch_ledger=lambda: os.utime(place + "/storage/ledger.sqlite3", (1, 1)),
    give_ledger_away=lambda: os.chown(place + "/storage/ledger.sqlite3", os.getuid(), -1),
    write_outside=lambda: open(place + "/written", "w"),
    link_out=lambda: os.symlink(place + "/storage", os.environ.get("TMPDIR", place) + "/link"),
    kill_parent=lambda: os.kill(os.getppid(), {signal}),
    slow_parent=lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), os.getpriority(os.PRIO_PROCESS, os.getppid())),
    limit_parent=lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CORE),
    move_parent=lambda: os.sched_setaffinity(os.getppid(), os.sched_getaffinity(0)),
    environment_of_parent=lambda: open("/proc/%d/environ" % os.getppid()).read(),
    memory_of_parent=lambda: open("/proc/%d/mem" % os.getppid(), "rb"),
    password=lambda: os.environ["PGPASSWORD"],
    outlive=lambda: ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) and 1 / 0,
    own_file=lambda: open(os.environ.get("TMPDIR", place) + "/own", "w").close(),
)
done = []
for name, attempt in tries.items():
    try:
        attempt()
        done.append(name)
    except BaseException:
        pass
line = json.dumps(dict(said="refused", message="succeeded: " + " ".join(done))).encode()
os.write(int(sys.argv[1]), line + b"\\n")
"""

ALLOWED = {"own_file"}  # a contained model may do this, and nothing else of the list
NAMES = {line.split("=")[0].strip() for line in _SOURCE.split("tries = dict(")[1].split("\n)")[0].splitlines() if line}


@dataclass(frozen=True, slots=True)
class Place:
    """A node's files, and sockets that somebody listens on."""

    folder: Path
    tcp: socket.socket
    unix: socket.socket

    def source(self, *, severe: bool) -> str:
        """Return the attempts; severe ones would end the parent, or their own process, where nothing held them."""
        port = self.tcp.getsockname()[1]
        return _SOURCE.format(place=str(self.folder), port=port, signal=9 if severe else 0, severe=severe)

    def is_untouched(self) -> bool:
        """Return whether nothing has happened to it."""
        ledger = self.folder / "storage" / "ledger.sqlite3"
        unheard = not _was_called(self.tcp) and not _was_called(self.unix)
        absent = not any((self.folder / name).exists() for name in ("command", "shell", "written", "link"))
        same = ledger.read_bytes() == b"ledger of the node" and ledger.stat().st_mode & 0o777 == 0o600
        return unheard and absent and same and ledger.stat().st_mtime > 1


def _was_called(listener: socket.socket) -> bool:
    listener.settimeout(0.1)
    try:
        listener.accept()[0].close()
    except TimeoutError:
        return False
    return True


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """Make the files, and listen."""
    for name, content in (
        ("storage/spool/1.dcm", "images of a patient"),
        ("storage/ledger.sqlite3", "ledger of the node"),
        ("home/.ssh/id_ed25519", "a key"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "storage" / "ledger.sqlite3").chmod(0o600)
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        unix.bind(str(folder / "socket"))
        unix.listen()
        yield Place(folder, tcp, unix)
