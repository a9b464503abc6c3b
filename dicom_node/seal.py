"""What proves that the node wrote a message: HMAC-SHA-256 under a key that only the node and its workers can read."""

from __future__ import annotations

import hmac

_LENGTH = 64  # hexadecimal digits before the message
_LARGEST = 1 << 16  # bytes; the node's own messages have less than one thousand


def sealed(key: bytes, queue: str, message: bytes) -> bytes:
    """Return a message with its seal in front, good for one queue only."""
    return _seal(key, queue, message) + message


def opened(key: bytes, queue: str, data: bytes) -> bytes | None:
    """Return the message that was sealed for this queue; None where the seal is missing, wrong or another queue's."""
    if not _LENGTH < len(data) <= _LARGEST:
        return None
    seal, message = data[:_LENGTH], data[_LENGTH:]
    return message if hmac.compare_digest(seal, _seal(key, queue, message)) else None


def _seal(key: bytes, queue: str, message: bytes) -> bytes:
    return hmac.new(key, queue.encode() + b"\0" + message, "sha256").hexdigest().encode()
