"""Programs of this machine: found, given free ports, started, ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

LOOPBACK = "127.0.0.1"
PLUGINS = ("/usr/share/orthanc/plugins", "/usr/local/share/orthanc/plugins", "/usr/lib/orthanc/plugins")
_START = 60.0  # seconds that a program may take to answer
_GRACE = 40.0  # seconds that it may take to end; the node lets a model finish for 20


class CannotRun(Exception):
    """Something is missing, taken or gone; the message says what to do."""


def executable(name: str, package: str) -> str:
    """Return the path of a program, or raise with the package that has it."""
    found = shutil.which(name, path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', '')}")
    if found is None:
        raise CannotRun(f"{name} is missing: apt-get install {package}")
    return found


def plugin(name: str, package: str) -> str:
    """Return the path of one of Orthanc's plugins, or raise with the package that has it."""
    for folder in PLUGINS:
        if (path := Path(folder) / name).exists():
            return str(path)
    raise CannotRun(f"Orthanc's plugin {name} is missing: apt-get install {package}")


def require_free(ports: Mapping[str, int]) -> None:
    """Raise with the option's name where a port is taken, or named twice."""
    for option, port in ports.items():
        if twins := [other for other in ports if other != option and ports[other] == port]:
            raise CannotRun(f"{option} and {twins[0]} both name port {port}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or "no port has that number"
                raise CannotRun(f"port {port}: {reason}. Name another with {option}") from None


def listens(port: int) -> None:
    """Raise OSError where nobody listens on a port of this machine."""
    socket.create_connection((LOOPBACK, port), 1.0).close()


@contextlib.contextmanager
def process(
    name: str, command: list[str], log: Path, answers: Callable[[], object]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the end of the block; it is up as soon as `answers` raises no OSError."""
    environment = {**os.environ, "TCP_NODELAY": "1"}  # else the DCMTK in Orthanc sends 20 images a second
    with log.open("ab") as output:
        # a session of its own: Ctrl-C is for us, and we end the others in the right order
        running = subprocess.Popen(  # noqa: S603 - Orthanc and ourselves
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        _wait_for(name, running, log, answers)
        yield running
    finally:
        _end(running)


def _wait_for(name: str, running: subprocess.Popen[bytes], log: Path, answers: Callable[[], object]) -> None:
    deadline = time.monotonic() + _START
    while running.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            answers()
            return
        time.sleep(0.1)
    raise CannotRun(f"{name} did not start; its log ends:\n{tail(log)}")


def _end(running: subprocess.Popen[bytes]) -> None:
    running.terminate()
    try:
        running.wait(_GRACE)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])
