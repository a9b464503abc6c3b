"""An object goes out as fast as its peer takes it, and no more of it is in memory than a few messages."""

from __future__ import annotations

import time
from typing import Any

from pynetdicom.association import Association
from pynetdicom.pdu_primitives import MaximumLengthNotification

_LONGEST = 1 << 17  # bytes of a PDU, also for a peer that sets no limit: pynetdicom would make one PDU of a whole file
_WAITING = 64  # PDUs that have been read and not yet sent
_MOMENT = 0.001  # seconds
_DATA_TRANSFER = "Sta6"  # PS3.8 Table 9-10


def pace(association: Association) -> None:
    """Let whoever sends on an established association wait while enough of it is on the way.

    pynetdicom reads a file as fast as the disk gives it and queues what the connection has not taken yet.
    """
    for item in association.acceptor.user_information:
        if isinstance(item, MaximumLengthNotification):
            item.maximum_length_received = min(item.maximum_length_received or _LONGEST, _LONGEST)
    provider: Any = association.dul
    send = provider.send_pdu

    def paced(primitive: Any) -> None:
        while (
            provider.to_provider_queue.qsize() >= _WAITING
            and provider.is_alive()
            and provider.state_machine.current_state == _DATA_TRANSFER
        ):
            time.sleep(_MOMENT)
        send(primitive)

    provider.send_pdu = paced
