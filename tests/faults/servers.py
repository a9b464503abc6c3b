"""Real servers that the tests restart and kill: PostgreSQL and Redis."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import redis

from tests.acceptance.stand import free_port, wait_for


def program_of_postgresql(name: str) -> str | None:
    """Return the path of one of PostgreSQL's programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


class PostgreSQL:
    """A server on a Unix socket, with fsync as in a hospital."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dicom-node-pg-"))  # a short path: a socket's may have 107 bytes
        self._runner: list[str] = []
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
            self._runner = ["runuser", "-u", "postgres", "--"]
        self._run("initdb", "-U", "node", "-A", "trust", "-E", "UTF8")
        self.start()
        createdb = [program_of_postgresql("createdb"), "-h", str(self.folder), "-U", "node", "ledger"]
        subprocess.run([*self._runner, *createdb], check=True, cwd="/")

    @staticmethod
    def is_here() -> bool:
        """Return whether it can be run on this machine."""
        return program_of_postgresql("initdb") is not None and (
            os.geteuid() != 0
            or (
                shutil.which("runuser") is not None
                and not subprocess.run(["id", "postgres"], capture_output=True).returncode
            )
        )

    @property
    def url(self) -> str:
        """Return the URL of the ledger."""
        return f"postgresql+psycopg://node@/ledger?host={self.folder}"

    def _run(self, name: str, *arguments: str) -> None:
        command = [*self._runner, program_of_postgresql(name), "-D", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c max_connections=200"
        self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` ends connections, `immediate` is a crash."""
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def end(self) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)


class Redis:
    """A server on a loopback port that keeps nothing on disk."""

    def __init__(self, executable: str, folder: Path) -> None:
        self.port = free_port()
        self._command = [
            executable,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(folder),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Return its URL as settings have it."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        """Return a client."""
        return redis.Redis(port=self.port, socket_timeout=3)

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for("Redis", self._answers, seconds=20)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(self.client.ping())
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)


def flush(client: redis.Redis) -> None:
    """Make a broker forget everything, where it answers."""
    with contextlib.suppress(redis.RedisError, OSError):
        client.flushall()


def double(client: redis.Redis) -> None:
    """Send every message that waits a second time, where the broker answers."""
    with contextlib.suppress(redis.RedisError, OSError):
        for queue in ("infer", "deliver"):
            for message in client.lrange(queue, 0, -1):
                client.rpush(queue, message)
