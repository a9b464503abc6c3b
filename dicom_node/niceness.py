"""Who comes first on a machine whose processors are busy: who acknowledges, then everybody else, then models.

What an acknowledgement needs of a processor is a fraction of a millisecond, but it may have to wait for it behind
another program for several, and a scanner waits with it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

RECEIVER, WORKER = -15, 5  # niceness (setpriority(2)): -20 is first, 19 is last, 0 is what nobody has chosen

_THREADS = Path("/proc/self/task")  # each has a place of its own, and begins where the one was that started it


def come_first() -> None:
    """Put this process before other programs.

    Where the system does not allow it (it takes root, CAP_SYS_NICE or RLIMIT_NICE), or somebody has chosen another
    place for it already, it stays there.
    """
    if _niceness() == 0:
        with suppress(PermissionError):
            _move(RECEIVER)


def come_last() -> None:
    """Put this process behind other programs."""
    _move(max(WORKER, _niceness()))


def wait_asleep() -> None:
    """Have a network's threads sleep where they wait for one another, unless the operator has said otherwise.

    OpenMP has them turn in circles for some milliseconds, on processors that a receiver, or another worker, has work
    for. Call it before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def _move(niceness: int) -> None:
    for thread in _THREADS.iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
