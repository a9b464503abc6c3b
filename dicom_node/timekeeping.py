"""Notices that the machine's clock was set back, while the node runs or while it was away."""

from __future__ import annotations

import time

import structlog

from dicom_node.config import Settings
from dicom_node.ledger import Ledger

log = structlog.get_logger()

_NOTICED = 2.0  # seconds; less than that is a clock that is being disciplined


class Timekeeping:
    """Compares the time of day with a clock that nobody sets."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        """Bring the moments of `ledger` near again where they have moved away."""
        self._settings = settings
        self._ledger = ledger
        self._last: tuple[float, float] | None = None  # time of day, and the other clock

    def tick(self, *, now: float, monotonic: float | None = None) -> bool:
        """Return whether the clock was found set back; the first time it is compared with the ledger's last event."""
        steady = time.monotonic() if monotonic is None else monotonic
        expected = self._ledger.moments.latest() if self._last is None else self._last[0] + steady - self._last[1]
        behind = expected - now
        if behind > _NOTICED:
            log.warning("clock.set_back", seconds=round(behind, 1))
            self._ledger.moments.clock_was_set_back(
                seconds=behind,
                lease=self._settings.jobs.lease,
                ask_again_after=self._settings.commitment.ask_again_after,
                now=now,
            )
        self._last = now, steady
        return behind > _NOTICED
