"""The digest of a data set: what disks, crashes and senders do to bytes changes it.

XXH3 with 128 bits costs a twenty-fifth of SHA-256 and finds the same accidents. It keeps out nobody who can write to
the storage folder, and neither would SHA-256: whoever can, can write to the ledger beside it. Files of earlier versions
have a SHA-256, and are still checked by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import xxhash

SIZE = 16  # bytes of what `digesting` gives
_AT_ONCE = 61_440  # bytes

_BY_LENGTH: Mapping[int, Callable[[], Any]] = {SIZE: xxhash.xxh3_128, 32: hashlib.sha256}


class Digest(Protocol):
    """A digest while it is being made."""

    def update(self, content: Any, /) -> object:
        """Go on with the next bytes."""

    def digest(self) -> bytes:
        """Return it so far."""

    def hexdigest(self) -> str:
        """Return it so far, in hexadecimal."""


def digesting() -> Digest:
    """Return the digest of no bytes yet."""
    made: Digest = xxhash.xxh3_128()
    return made


def feed(digest: Digest, content: memoryview) -> None:
    """Go on with the next bytes, and keep the interpreter's lock, for 1 µs at a time: to have it again takes longer.

    xxhash gives it up for more than 65,536 bytes.
    """
    for at in range(0, len(content), _AT_ONCE):
        digest.update(content[at : at + _AT_ONCE])


def digesting_like(digest: str) -> Digest:
    """Return the digest of no bytes yet, of the kind that `digest` (hex) is; raise ValueError where it is none."""
    kind = _BY_LENGTH.get(len(digest) // 2)
    if kind is None:
        raise ValueError("no digest")
    made: Digest = kind()
    return made


def is_digest(value: bytes) -> bool:
    """Return whether `value` may be one, by its length."""
    return len(value) in _BY_LENGTH
