"""Messages that no library would write: each is answered with a status or ends its association, and leaves nothing."""

from __future__ import annotations

import random
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from tests.datasets import CT, EXPLICIT, IMPLICIT, ct, encoded, uid
from tests.fuzz.conftest import SLACK
from tests.fuzz.encoding import (
    ABORT,
    BULK,
    COMMAND,
    COMMITMENT,
    COMMITMENT_INSTANCE,
    ECHO,
    LAST,
    PROMISE,
    RELEASE_RQ,
    STORE,
    VERIFICATION,
    Connection,
    Silence,
    associate_rq,
    command,
    element,
    fragments,
    message,
    p_data,
    pdv,
    role,
    store,
    store_rq,
)

PATIENCE = 9.0  # seconds in which the node of `watched` gives up on anybody: twice its network_timeout, and a bit
INSTANCE = uid("study", "series", 1)
DATA = encoded(ct(1), EXPLICIT)
REQUEST = command(*store_rq(INSTANCE))
ECHO_RQ = command(
    element(0x00000002, VERIFICATION), element(0x00000100, 0x0030), element(0x00000110, 7), element(0x00000800, 0x0101)
)
AS_COMMAND = pdv(STORE, COMMAND | LAST, REQUEST)


def without(tag: int) -> bytes:
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    return command(*(one for one in store_rq(INSTANCE) if not one.startswith(head)))


def n_service(field: int, *, context: int = PROMISE, data: bytes | None = b"\0" * 20) -> list[bytes]:
    elements = (
        element(0x00000003, COMMITMENT),
        element(0x00000100, field),
        element(0x00000110, 9),
        element(0x00000800, 0x0101 if data is None else 1),
        element(0x00001001, COMMITMENT_INSTANCE),
        element(0x00001002, 1),
        element(0x00001008, 1),
    )
    return message(context, command(*elements), data)


CASES: dict[str, list[bytes]] = {
    # command sets
    "group length too long": message(STORE, command(*store_rq(INSTANCE), group_length=0xFFFFFFFF), DATA),
    "group length 0": message(STORE, command(*store_rq(INSTANCE), group_length=0), DATA),
    "no group length": message(STORE, b"".join(store_rq(INSTANCE)), DATA),
    "an empty command set": message(STORE, b"", DATA),
    "a command set of one byte": message(STORE, b"\0", DATA),
    "an element that claims 4 GB": message(
        STORE, command(*store_rq(INSTANCE), element(0x00001031, b"", length=2**32 - 1))
    ),
    "an element that claims 2 GB": message(
        STORE, command(element(0x00000002, CT, length=2**31), *store_rq(INSTANCE)[1:])
    ),
    "an element that claims one byte too many": message(
        STORE, command(*store_rq(INSTANCE)[:-1], element(0x00001000, INSTANCE, length=len(INSTANCE) + 3))
    ),
    "elements in reverse order": message(STORE, command(*store_rq(INSTANCE)[::-1]), DATA),
    "the same element a thousand times": message(
        STORE, command(*store_rq(INSTANCE), *[element(0x00000110, 5)] * 1000), DATA
    ),
    "elements of another group": message(STORE, command(*store_rq(INSTANCE), element(0x00100010, "Somebody")), DATA),
    "a UID of 500 characters": message(STORE, command(*store_rq("1." * 250)), DATA),
    "a UID that is a path": message(STORE, command(*store_rq("../../../../tmp/hostile")), DATA),
    "a UID of bytes": message(STORE, command(*store_rq(INSTANCE)[:-1], element(0x00001000, b"\xff\xfe\0\0\x80")), DATA),
    "a message id of four bytes": message(
        STORE, command(*store_rq(INSTANCE)[:2], element(0x00000110, 1, size=4)), DATA
    ),
    "a command field of four bytes": message(
        STORE, command(element(0x00000100, 1, size=4), *store_rq(INSTANCE)[2:]), DATA
    ),
    "an empty command field": message(STORE, command(element(0x00000100, b""), *store_rq(INSTANCE)[2:]), DATA),
    **{f"no ({tag:08x})": message(STORE, without(tag), DATA) for tag in (2, 0x100, 0x110, 0x700, 0x800, 0x1000)},
    **{
        f"command field 0x{field:04x}": message(STORE, command(*store_rq(INSTANCE, field=field)), DATA)
        for field in (0x0000, 0x0010, 0x0020, 0x0021, 0x0030, 0x0FFF, 0x7FFF, 0x8001, 0x8020, 0x8030, 0xFFFF)
    },
    "C-CANCEL": message(
        STORE, command(element(0x00000100, 0x0FFF), element(0x00000120, 1), element(0x00000800, 0x0101))
    ),
    "C-CANCEL in the middle of a data set": [
        *fragments(STORE, REQUEST, of_command=True),
        p_data(pdv(STORE, 0, DATA[:100])),
        *message(STORE, command(element(0x00000100, 0x0FFF), element(0x00000120, 1), element(0x00000800, 0x0101))),
    ],
    "a priority that there is not": message(
        STORE, command(*store_rq(INSTANCE)[:3], element(0x00000700, 0x7777), *store_rq(INSTANCE)[4:]), DATA
    ),
    "says that no data set follows, and sends one": message(STORE, command(*store_rq(INSTANCE, data_set=0x0101)), DATA),
    "says that a data set follows, and sends none": message(STORE, REQUEST),
    "no data set, but the next command": [*message(STORE, REQUEST), *message(ECHO, ECHO_RQ)],
    "an empty data set": message(STORE, REQUEST, b""),
    "another SOP class than was agreed on": message(STORE, command(*store_rq(INSTANCE, sop_class=VERIFICATION)), DATA),
    # presentation contexts
    **{f"context {number}": message(number, REQUEST, DATA) for number in (0, 2, 9, 255)},
    "C-STORE where only C-ECHO was agreed on": message(ECHO, REQUEST, DATA),
    "C-ECHO where only C-STORE was agreed on": message(STORE, ECHO_RQ),
    "the data set in another context than its command": [
        *fragments(STORE, REQUEST, of_command=True),
        *fragments(BULK, DATA),
    ],
    "fragments of two contexts in turn": [
        p_data(AS_COMMAND, pdv(BULK, COMMAND | LAST, REQUEST)),
        p_data(pdv(STORE, 0, DATA[:50]), pdv(BULK, 0, DATA[:50])),
        p_data(pdv(STORE, LAST, DATA[50:]), pdv(BULK, LAST, DATA[50:])),
    ],
    # presentation data values
    "the data set before its command": [*fragments(STORE, DATA), *fragments(STORE, REQUEST, of_command=True)],
    "a data set without a command": fragments(STORE, DATA),
    "two commands at once": [p_data(AS_COMMAND, AS_COMMAND), *fragments(STORE, DATA)],
    "the command again inside of its data set": [
        p_data(AS_COMMAND),
        p_data(pdv(STORE, 0, DATA[:100])),
        p_data(AS_COMMAND),
        p_data(pdv(STORE, LAST, DATA[100:])),
    ],
    "a command set in 200 fragments": [*fragments(STORE, REQUEST, 1, of_command=True), *fragments(STORE, DATA)],
    "a data set in fragments of one byte": [
        p_data(AS_COMMAND, *[pdv(STORE, 0, DATA[at : at + 1]) for at in range(len(DATA))], pdv(STORE, LAST, b""))
    ],
    "ten thousand empty fragments": [p_data(AS_COMMAND), p_data(*[pdv(STORE, 0, b"")] * 10_000)],
    "a P-DATA-TF with nothing in it": [p_data()],
    "a P-DATA-TF of three bytes": [p_data(b"\0\0\0")],
    **{
        f"a PDV that claims {length} bytes": [p_data(AS_COMMAND, pdv(STORE, LAST, DATA, length=length))]
        for length in (0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1)
    },
    "a PDV that is cut off": [p_data(AS_COMMAND + pdv(STORE, LAST, DATA)[:-5])],
    **{
        f"control headers {first:02x} {second:02x}": [
            p_data(pdv(STORE, first, REQUEST)),
            p_data(pdv(STORE, second, DATA)),
        ]
        for first, second in product((0, 1, 2, 3), repeat=2)
        if (first, second) != (3, 2)
    },
    "control headers with bits that mean nothing": [
        p_data(pdv(STORE, 0xFC | COMMAND | LAST, REQUEST)),
        p_data(pdv(STORE, 0xFC | LAST, DATA)),
    ],
    # services that were never agreed on
    **{
        f"N-service 0x{field:04x}": n_service(field)
        for field in (0x0100, 0x0110, 0x0120, 0x0130, 0x0140, 0x0150, 0x8100, 0x8110, 0x8130)
    },
    "N-ACTION where C-STORE was agreed on": n_service(0x0130, context=STORE),
    "N-ACTION without its data": n_service(0x0130, data=None),
    "N-ACTION with garbage": n_service(0x0130, data=b"\xff" * 1001),
    # the association itself
    "a second A-ASSOCIATE-RQ": [associate_rq()],
    "an A-ASSOCIATE-RQ inside of a data set": [p_data(AS_COMMAND), p_data(pdv(STORE, 0, DATA[:40])), associate_rq()],
    "a release inside of a data set": [p_data(AS_COMMAND), p_data(pdv(STORE, 0, DATA[:40])), RELEASE_RQ],
    "an abort inside of a data set": [p_data(AS_COMMAND), p_data(pdv(STORE, 0, DATA[:40])), ABORT],
    "data after the release": [RELEASE_RQ, *message(STORE, REQUEST, DATA)],
    "two releases": [RELEASE_RQ, RELEASE_RQ],
    "a release response that nobody asked for": [struct.pack(">BBII", 6, 0, 4, 0)],
    "an acceptance that nobody asked for": [b"\x02" + associate_rq()[1:]],
    "a rejection that nobody asked for": [struct.pack(">BBIBBBB", 3, 0, 4, 0, 1, 1, 1)],
    "a PDU of no type": [b"\x99" + ABORT[1:]],
    "nothing at all": [],
}


@pytest.fixture
def said(watched):
    """Says how cases end, each on a connection of its own, several at a time; then the node is as it was."""
    threads, descriptors = watched.threads, watched.descriptors

    def run(cases: dict[str, list[bytes]]) -> dict[str, str]:
        with ThreadPoolExecutor(16) as pool:
            return dict(zip(cases, pool.map(lambda case: said_to(watched.port, case), cases.values()), strict=True))

    yield run
    assert watched.node.answers()
    watched.settle(threads=threads, descriptors=descriptors)
    assert "Traceback" not in watched.node.log()
    assert ".defect" not in watched.node.log()


def said_to(port: int, pdus: list[bytes]) -> str:
    with Connection(port) as connection:
        if (answered := connection.associate()) != 2:
            return f"not associated: {answered}"
        connection.send(pdus)
        try:
            return connection.ending(seconds=PATIENCE)
        except Silence:
            return "silence"


def test_every_odd_message_is_answered_or_ends_its_association(said, watched):
    endings = said(CASES)

    other = {case: how for case, how in endings.items() if how not in ("status", "aborted", "released", "closed")}
    assert not other, watched.node.log()[-3000:]


def test_what_is_odd_and_harmless_is_stored(watched):
    """As every receiver does: the order of fragments and unknown elements do not matter."""
    harmless = (
        "a command set in 200 fragments",
        "a data set in fragments of one byte",
        "control headers with bits that mean nothing",
    )
    for name in harmless:
        with Connection(watched.port) as connection:
            connection.associate()
            connection.send(CASES[name])

            assert connection.statuses() == [0x0000], name


def test_after_a_refused_message_the_association_goes_on(watched):
    with Connection(watched.port) as connection:
        connection.associate()
        refused = store(connection, STORE, INSTANCE, DATA[:-300], number=1)
        missing = store(connection, STORE, uid("another"), DATA, number=2)
        stored = store(connection, STORE, INSTANCE, DATA, number=3)

        assert (refused, missing, stored) == (0xC000, 0xA900, 0x0000)


@pytest.mark.parametrize(("scu", "scp"), [(0, 0), (0, 1), (1, 0), (1, 1), (255, 255)])
def test_roles_that_make_no_sense_open_no_door(watched, scu, scp):
    """Whoever is no SCU of Storage cannot store, and a response that nobody waits for is no message."""
    with Connection(watched.port) as connection:
        assert connection.associate(user_items=role(CT, scu=scu, scp=scp) + role("1.2.3", scu=scu, scp=scp)) in (
            2,
            3,
            7,
        )
        connection.send(message(STORE, command(*store_rq(INSTANCE, field=0x8001)), None))
        connection.send(message(STORE, REQUEST, DATA))

        assert connection.ending(seconds=PATIENCE) in ("status", "aborted", "closed")


@pytest.mark.parametrize(
    "contexts",
    [
        [],
        [(1, VERIFICATION, IMPLICIT)] * 2,
        [(2, VERIFICATION, IMPLICIT)],
        [(0, VERIFICATION, IMPLICIT)],
        [(number, CT, EXPLICIT) for number in range(1, 256, 2)],
        [(1, "", "")],
        [(1, "1" * 300, "2" * 300)],
        [(1, CT, "1.2.3"), (3, "1.2.3", EXPLICIT)],
        [(1, "", IMPLICIT)],
        [(1, VERIFICATION, "")],
    ],
    ids=["none", "twice", "even", "zero", "128", "empty", "too long", "unknown", "no abstract", "no transfer"],
)
def test_odd_presentation_contexts_are_answered_and_leave_no_thread(watched, contexts):
    threads, descriptors = watched.threads, watched.descriptors
    with Connection(watched.port) as connection:
        if connection.associate(contexts=contexts) == 2:
            connection.send([*message(1, ECHO_RQ), RELEASE_RQ])

            assert connection.ending(seconds=PATIENCE) in ("status", "aborted", "rejected", "released", "closed")

    watched.settle(threads=threads - SLACK, descriptors=descriptors)
    assert ".defect" not in watched.node.log()


def test_an_empty_last_fragment_in_a_pdu_of_its_own_ends_the_data_set(watched):
    pieces = [pdv(STORE, 0, DATA[at : at + 100]) for at in range(0, len(DATA), 100)]
    with Connection(watched.port) as connection:
        connection.associate()
        time.sleep(0.3)  # until then pynetdicom reads; the node's own reader is meant
        connection.send([p_data(AS_COMMAND), *[p_data(piece) for piece in pieces]])
        time.sleep(0.1)
        connection.send([p_data(pdv(STORE, LAST, b""))])
        connection.timeout = 3.0  # the kernel would let go after network_timeout, which is 4 s here

        assert connection.statuses() == [0x0000]


def mutated_message(chance: random.Random) -> list[bytes]:
    """Return a real C-STORE whose command set, fragments and heads have been tampered with."""
    elements = list(store_rq(uid("mutated", chance.random())))
    for _ in range(chance.randint(0, 3)):
        number = chance.randrange(len(elements))
        kind = chance.randrange(4)
        if kind == 0:
            del elements[number]
        elif kind == 1:
            elements.insert(number, chance.choice(elements))
        elif kind == 2:
            changed = bytearray(elements[number])
            changed[chance.randrange(len(changed))] = chance.randrange(256)
            elements[number] = bytes(changed)
        else:
            chance.shuffle(elements)
        if not elements:
            break
    length = chance.choice([None, None, None, 0, 7, 2**32 - 1])
    pdus = message(STORE, command(*elements, group_length=length), DATA, size=chance.choice([1, 13, 200, 16370]))
    for _ in range(chance.randint(0, 3)):
        number = chance.randrange(len(pdus))
        changed = bytearray(pdus[number])
        at = chance.choice([chance.randrange(min(12, len(changed))), chance.randrange(len(changed))])
        changed[at] = chance.choice([0, 1, 2, 3, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        pdus[number] = bytes(changed)
    return pdus


def test_mutated_messages_are_answered_or_end_their_association(said):
    chance = random.Random(5)
    endings = said({str(number): mutated_message(chance) for number in range(150)})

    assert set(endings.values()) <= {"status", "aborted", "released", "closed"}, endings
