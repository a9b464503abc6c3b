"""Child processes of the node: started, watched, started again, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

import structlog

log = structlog.get_logger()

_FIRST_PAUSE = 0.2  # seconds before a child that died is started again; doubles while it keeps dying
_LONGEST_PAUSE = 30.0
_HEALTHY_AFTER = 20.0


class Child:
    """One process that ought to run for as long as the node does."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        *,
        on_death: Callable[[int], None] = lambda pid: None,
        on_line: Callable[[bytes], None] | None = None,
    ) -> None:
        """Run what `command` returns, asked anew at each start; `on_death` gets the dead process's number.

        `on_line` gets, in a thread of its own, what it writes to its standard output: the node's own otherwise.
        """
        self.name = name
        self._command = command
        self._on_death = on_death
        self._on_line = on_line
        self._pause = _FIRST_PAUSE
        self._started = 0.0
        self._start_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process in a session of its own, so that a terminal's Ctrl-C reaches only the node."""
        self._started = time.monotonic()
        output = subprocess.PIPE if self._on_line else None
        self.process = subprocess.Popen(  # noqa: S603 - our own command
            list(self._command()), stdin=subprocess.DEVNULL, stdout=output, start_new_session=True
        )
        if self._on_line and self.process.stdout:
            about = self.process.stdout, self._on_line
            threading.Thread(target=_read, args=about, name=f"reads {self.name}", daemon=True).start()
        log.debug("child.started", name=self.name, pid=self.process.pid)
        return self.process

    def watch(self) -> None:
        """Start the process again where it has died, after a pause that grows while it keeps dying."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            self._buried(self.process, now)
        if self.process is None and now >= self._start_at:
            self.start()

    def _buried(self, process: subprocess.Popen[bytes], now: float) -> None:
        healthy = now - self._started > _HEALTHY_AFTER
        self._pause = _FIRST_PAUSE if healthy else min(self._pause * 2, _LONGEST_PAUSE)
        self._start_at = now + self._pause
        self.process = None
        log.error("child.died", name=self.name, code=process.returncode, restart_in=f"{self._pause:g} s")
        self._on_death(process.pid)

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def stop(self, *, grace: float) -> None:
        """Wait for the end, `grace` seconds at most, then kill."""
        if self.process is None:
            return
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            log.warning("child.killed", name=self.name)
            self.process.kill()
            self.process.wait()


def _read(stream: IO[bytes], on_line: Callable[[bytes], None]) -> None:
    with stream:
        for line in stream:
            on_line(line)


def die_with(parent: int) -> None:
    """End this process at once when the node that started it is gone: the next life starts its own."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
