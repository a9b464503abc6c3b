"""Recordings of real associations, and what becomes of them: bytes flipped, lengths that lie, parts lost, doubled."""

from __future__ import annotations

import random
import struct

from pynetdicom import AE, evt

from dicom_node.commitment import (
    STORAGE_COMMITMENT,
    STORAGE_COMMITMENT_INSTANCE,
    Reference,
    Request,
    request_dataset,
)
from tests.datasets import CT, EXPLICIT, IMPLICIT, as_file, ct

VERIFICATION = "1.2.840.10008.1.1"


def record(port: int) -> list[bytes]:
    """Return the PDUs of a well-behaved peer: association, C-ECHO, C-STORE, N-ACTION, N-EVENT-REPORT, release."""
    sent: list[bytes] = []
    entity = AE(ae_title="FUZZER")
    for sop_class, syntax in ((VERIFICATION, IMPLICIT), (CT, EXPLICIT), (CT, IMPLICIT), (STORAGE_COMMITMENT, IMPLICIT)):
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate(
        "127.0.0.1", port, evt_handlers=[(evt.EVT_DATA_SENT, lambda event: sent.append(event.data))]
    )
    assert association.is_established
    association.send_c_echo()
    association.send_c_store(as_file(ct(1), EXPLICIT))
    asked = request_dataset(Request("1.2.3", (Reference(CT, "1.2.3.4"),)))
    association.send_n_action(asked, 1, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE)
    association.send_n_event_report(asked, 1, STORAGE_COMMITMENT, STORAGE_COMMITMENT_INSTANCE)
    association.release()
    return sent


_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
_LENGTHS = (0, 1, 2, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
_SHORT_LENGTHS = (0, 1, 2, 0x7FFF, 0xFFFE, 0xFFFF)


def _flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.choice((*_INTERESTING, chance.randrange(256)))


def _lie(data: bytearray, chance: random.Random) -> None:
    """Put a length that is wrong where there may be one."""
    wide = chance.random() < 0.5
    form = chance.choice((">I", "<I")) if wide else chance.choice((">H", "<H"))
    at = 2 if wide and chance.random() < 0.5 else chance.randrange(len(data) - 4)
    struct.pack_into(form, data, min(at, len(data) - 4), chance.choice(_LENGTHS if wide else _SHORT_LENGTHS))


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def _double(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at:at] = data[at : at + chance.randint(1, 400)] * chance.randint(1, 5)


def _lose(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    del data[at : at + chance.randint(1, 40)]


_MUTATIONS = (_flip, _flip, _flip, _lie, _lie, _cut, _double, _lose)


def mutated(recording: list[bytes], chance: random.Random) -> list[bytes]:
    """Return the PDUs of one hostile association."""
    pdus = list(recording)
    if chance.random() < 0.05:
        return [chance.randbytes(chance.randint(1, 2000))]
    if chance.random() < 0.25:
        chance.shuffle(pdus)
    if chance.random() < 0.25:
        pdus.insert(chance.randrange(len(pdus)), chance.choice(pdus))
    for _ in range(chance.randint(1, 3)):
        number = chance.randrange(len(pdus))
        data = bytearray(pdus[number])
        for _ in range(chance.randint(1, 3)):
            if len(data) >= 6:
                chance.choice(_MUTATIONS)(data, chance)
        pdus[number] = bytes(data)
    return pdus


def mutated_dataset(data: bytes, chance: random.Random) -> bytes:
    """Return a data set as a broken or hostile sender might write it."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if len(changed) >= 6:
            chance.choice(_MUTATIONS)(changed, chance)
    return bytes(changed)


def nested(depth: int) -> bytes:
    """Return a data set (explicit VR little endian) of sequences of undefined length, one within the other."""
    opening = b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    return opening * depth + closing * depth
