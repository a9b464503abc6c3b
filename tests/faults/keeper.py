"""What systemd does for a node with Restart=always."""

from __future__ import annotations

import threading

from tests.acceptance.stand import NodeProcess


class Keeper(threading.Thread):
    """Starts a node again whenever its process has ended."""

    def __init__(self, running: NodeProcess, *, pause: float = 0.2) -> None:
        """Begin at once."""
        super().__init__(daemon=True, name="keeper")
        self._running, self._pause = running, pause
        self._ended = threading.Event()
        self.lives = 1
        self.codes: list[int] = []
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            process = self._running.process
            if process is not None and process.poll() is not None:
                self.codes.append(process.returncode)
                if self._ended.wait(self._pause):
                    return
                self.lives += 1
                self._running.spawn()

    def end(self) -> None:
        """Let the node be."""
        self._ended.set()
        self.join()
