"""Alarms that repeat: the first is reported at once, the others of the next minute as a number."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dicom_node.audit.messages import Indicator

_SECONDS = 60.0
_REMEMBERED = 1000  # alarms of a minute that are told apart; beyond that only by what they say


@dataclass(frozen=True, slots=True)
class Alarm:
    """Somebody was not let in."""

    words: str
    address: str
    ae_title: str = ""
    user: str | None = None  # that was named wrongly; the ledger never hears it
    indicator: Indicator = Indicator.SERIOUS


class Repeats:
    """Keeps a scanner of ports from filling the audit trail."""

    def __init__(self) -> None:
        """Remember nothing."""
        self._since: dict[Alarm, tuple[float, int]] = {}

    def is_new(self, alarm: Alarm, now: float) -> bool:
        """Return whether to report it now; otherwise it is counted."""
        key = self._key(alarm)
        if key not in self._since:
            self._since[key] = (now, 0)
            return True
        since, number = self._since[key]
        self._since[key] = (since, number + 1)
        return False

    def due(self, now: float, *, everything: bool = False) -> list[tuple[Alarm, int]]:
        """Return the alarms whose minute is over and how often they came again, and forget them."""
        over = [alarm for alarm, (since, _) in self._since.items() if everything or not 0 <= now - since < _SECONDS]
        ended = [(alarm, self._since.pop(alarm)[1]) for alarm in over]
        return [(alarm, number) for alarm, number in ended if number]

    def _key(self, alarm: Alarm) -> Alarm:
        if alarm in self._since or len(self._since) < _REMEMBERED:
            return alarm
        return replace(alarm, address="", ae_title="", user=None if alarm.user is None else "")
