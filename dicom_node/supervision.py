"""Child processes of the node: started, watched, started again, stopped."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence

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
    ) -> None:
        """Run what `command` returns, asked anew at each start; `on_death` gets the dead process's number."""
        self.name = name
        self._command = command
        self._on_death = on_death
        self._pause = _FIRST_PAUSE
        self._started = 0.0
        self._start_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process in a session of its own, so that a terminal's Ctrl-C reaches only the node."""
        self._started = time.monotonic()
        self.process = subprocess.Popen(  # noqa: S603 - our own command
            list(self._command()), stdin=subprocess.DEVNULL, start_new_session=True
        )
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
