"""A UID that pynetdicom has found right is not looked at again: associations propose the same hundreds, each time."""

from __future__ import annotations

from typing import Any

from pydicom.uid import UID
from pynetdicom import dimse_primitives, pdu_items, pdu_primitives, presentation, utils

_MOST = 4096  # remembered; a sender that makes up others has them looked at
_LONGEST = 64  # characters of a UID (PS3.5 9.1)
_known: dict[str | bytes, UID] = {}


def set_uid(
    value: Any, name: str, allow_empty: bool = True, allow_none: bool = True, validate: bool = True
) -> UID | None:
    """Return what pynetdicom makes of a UID, as it does: one that conforms is the one that it made before.

    Raises:
        TypeError, ValueError: it is none, as pynetdicom says.
    """
    # one with blanks around it may be as long as a PDU
    is_plain = isinstance(value, str | bytes) and len(value) <= _LONGEST and not hasattr(value, "_PRIVATE_TS_ENCODING")
    if is_plain and (known := _known.get(value)) is not None:
        return known
    made = utils.set_uid(value, name, allow_empty, allow_none, validate)
    if is_plain and made and made.is_valid:
        if len(_known) >= _MOST:
            _known.clear()
        _known[value] = made
    return made


def amend() -> None:
    """Have pynetdicom remember, in both directions; once or often."""
    for module in (dimse_primitives, pdu_items, pdu_primitives, presentation):
        module.set_uid = set_uid  # type: ignore[attr-defined]
