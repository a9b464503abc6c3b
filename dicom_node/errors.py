"""Every deliberate error of the node, sorted by the one question that matters: again, or never?

NodeError
├── Unavailable            try again later: the world may change
│   ├── SpoolFull          free space is below the watermark
│   ├── LedgerUnavailable  the database does not answer
│   ├── BrokerUnavailable  Redis does not answer
│   ├── PeerUnreachable    no association could be made
│   └── PeerBusy           the peer answered a status that means "later"
├── Refused                never again: the same input gives the same answer
│   ├── InvalidInstance    what was sent is not a storable instance
│   ├── LedgerRefused      the database cannot hold what it was given
│   ├── PeerRefused        the peer answered a status that means "no"
│   ├── ModelRefused       the model folder cannot be trusted or run
│   ├── InputRefused       the images cannot be made into a volume
│   ├── ResultRefused      a result object failed the node's own check
│   └── SettingsError      node.toml or model.toml is wrong; names the key
└── NotApplicable          the model was not made for this series: an answer, not a failure
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class NodeError(Exception):
    """An error the node raised on purpose."""

    def __init__(self, message: str = "") -> None:
        """Take `message`, or the first line of the class's docstring where it is empty."""
        super().__init__(message or (self.__doc__ or type(self).__name__).splitlines()[0])


class Unavailable(NodeError):
    """Not now; the same request may succeed later."""


class SpoolFull(Unavailable):
    """Free space is below the watermark."""


class LedgerUnavailable(Unavailable):
    """The ledger does not answer."""


class BrokerUnavailable(Unavailable):
    """The broker does not answer."""


class PeerUnreachable(Unavailable):
    """The peer did not accept an association."""


class PeerBusy(Unavailable):
    """The peer answered with a status that means "later"."""


class Refused(NodeError):
    """Never; the same request would be refused again."""


class InvalidInstance(Refused):
    """What was sent is not an instance that can be stored."""

    def __init__(self, status: int, comment: str, offending_element: int | None = None) -> None:
        """Carry the DIMSE `status` to answer, its Error Comment and the Offending Element (PS3.7 C)."""
        super().__init__(comment)
        self.status = status
        self.offending_element = offending_element


class LedgerRefused(Refused):
    """The ledger cannot hold what it was given."""


class PeerRefused(Refused):
    """The peer answered with a status that means "no"."""


class ModelRefused(Refused):
    """The model folder cannot be trusted or cannot be run."""


class InputRefused(Refused):
    """The images cannot be made into a volume."""


class ResultRefused(Refused):
    """A result object failed the node's own check."""


class SettingsError(Refused):
    """A settings file is wrong."""


@contextmanager
def listening(keys: str, host: str, port: int) -> Iterator[None]:
    """Give a context that listens where `keys` of the settings say; an OSError of it becomes SettingsError."""
    try:
        yield
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise SettingsError(f"{keys}: the node cannot listen on {host}, port {port}: {why}") from error


class NotApplicable(NodeError):
    """The model was not made for this series."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """Carry the coded `reason` (see `findings.Reason`) and a sentence with the numbers behind it."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
