"""Everything hostile at once against a real node, for as long as wanted: python -m tests.fuzz.soak --minutes N --seed S

Every few seconds an honest sender must get in and have an instance stored at once. Fails where the node printed a
traceback or a defect, held the honest sender up, or holds more threads, descriptors or memory at the end.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.acceptance.stand import NodeProcess, free_port
from tests.datasets import BIG_ENDIAN, CT, DEFLATED, EXPLICIT, IMPLICIT, ct, encoded, uid
from tests.fuzz.conftest import Watched
from tests.fuzz.encoding import (
    COMMAND,
    LAST,
    STORE,
    Connection,
    Silence,
    command,
    message,
    p_data,
    pdv,
    store,
    store_rq,
)
from tests.fuzz.files import bomb, claiming, deflated, items, real
from tests.fuzz.mutation import mutated, mutated_dataset, nested, record
from tests.fuzz.test_dimse import CASES, mutated_message

AT_ONCE = 6  # hostile connections
EVERY = 3.0  # seconds between two honest senders
PROMPT = 20.0  # seconds that an honest sender may take, on a machine with many other things to do
MAY_GROW = 80  # MB: what an allocator keeps
LONGEST = 60.0  # seconds that one attack may last: the node lets go of anybody before

_SETTINGS = """[receive]
minimum_free_megabytes = 10
association_timeout = 3
network_timeout = 15
maximum_instance_megabytes = 32
maximum_connections_per_address = 60
maximum_associations = 40
"""
_SYNTAXES = {1: EXPLICIT, 3: IMPLICIT, 5: BIG_ENDIAN, 7: DEFLATED}
_IN_EACH = [(number, CT, syntax) for number, syntax in _SYNTAXES.items()]


class Attacks:
    """Hostile connections by name; each returns how it ended."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.recording = record(port)
        self.whole = {number: encoded(ct(1), syntax) for number, syntax in _SYNTAXES.items()}
        self.files = list(real().values())
        self.all: list[Callable[[random.Random], str]] = [
            self.mutated_pdus,
            self.mutated_pdus,
            self.odd_message,
            self.mutated_message,
            self.mutated_data_sets,
            self.mutated_data_sets,
            self.crafted_data_set,
            self.garbage,
            self.silent,
            self.slow,
            self.vanishing,
            self.impatient,
        ]

    def mutated_pdus(self, chance: random.Random) -> str:
        return self._say(mutated(self.recording, chance), associate=False)

    def odd_message(self, chance: random.Random) -> str:
        return self._say(chance.choice(list(CASES.values())))

    def mutated_message(self, chance: random.Random) -> str:
        return self._say(mutated_message(chance))

    def mutated_data_sets(self, chance: random.Random) -> str:
        """Data sets of each transfer syntax, whole files among them, on one association: each gets its status."""
        with Connection(self.port, timeout=LONGEST) as connection:
            if connection.associate(contexts=_IN_EACH) != 2:
                return "not associated"
            for number in range(20):
                context = chance.choice(list(_SYNTAXES))
                data = chance.choice([self.whole[context], chance.choice(self.files)[:200_000]])
                instance = uid("study", "series", 1)
                status = store(connection, context, instance, mutated_dataset(data, chance), number + 1)
                if status == 0xFFFF:
                    return "ended instead of a status"
            return "statuses"

    def crafted_data_set(self, chance: random.Random) -> str:
        makers: list[tuple[int, Callable[[], bytes]]] = [
            (1, lambda: nested(10_000)),
            (1, lambda: items(20_000)),
            (1, lambda: claiming(2**32 - 2)),
            (7, lambda: bomb(100)),
            (7, lambda: deflated(items(20_000))),
            (1, lambda: bytes(chance.randrange(40_000_000))),
        ]
        context, maker = chance.choice(makers)
        with Connection(self.port, timeout=LONGEST) as connection:
            if connection.associate(contexts=_IN_EACH) != 2:
                return "not associated"
            status = store(connection, context, uid("crafted"), maker())
            return "statuses" if status != 0xFFFF else "ended instead of a status"

    def garbage(self, chance: random.Random) -> str:
        return self._say([chance.randbytes(chance.randint(1, 20_000))], associate=False)

    def silent(self, chance: random.Random) -> str:
        return self._say([chance.randbytes(chance.randint(0, 5))], associate=False)

    def slow(self, chance: random.Random) -> str:
        """A few bytes a second, in the middle of anything."""
        whole = b"".join(self.recording)
        with Connection(self.port) as connection:
            connection.send([whole[: chance.randrange(len(whole))]])
            until = time.monotonic() + LONGEST
            while not connection.hung_up and time.monotonic() < until:
                connection.send([b"\0"])
                time.sleep(0.3)
            return "closed" if connection.hung_up else "silence"

    def vanishing(self, chance: random.Random) -> str:
        """Gone in the middle, politely or not."""
        whole = b"".join(self.recording)
        with Connection(self.port) as connection:
            connection.send([whole[: chance.randrange(len(whole))]])
            if chance.random() < 0.5:
                connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return "gone"

    def impatient(self, chance: random.Random) -> str:
        """Message after message without reading an answer."""
        data = encoded(ct(chance.randint(1, 5), series="impatient"))
        pdus = [pdu for number in range(200) for pdu in message(STORE, command(*store_rq("1.2", number=number)), data)]
        with Connection(self.port) as connection:
            connection.associate()
            connection.socket.settimeout(2.0)
            connection.send([*pdus, p_data(pdv(STORE, COMMAND | LAST, b""))])
        return "gone"

    def _say(self, pdus: list[bytes], *, associate: bool = True) -> str:
        with Connection(self.port) as connection:
            if associate and connection.associate() != 2:
                return "not associated"
            connection.send(pdus)
            try:
                return connection.ending(seconds=40.0)
            except Silence:
                return "silence"


def honest(port: int, number: int) -> float:
    """Have one instance stored; return how many seconds that took. Raises AssertionError where it was not."""
    started = time.monotonic()
    with Connection(port, timeout=30.0) as connection:
        assert connection.associate(calling="HONEST") == 2, "an honest sender was not let in"
        instance = ct(number, study="honest", series=f"honest {number // 100}")
        status = store(connection, STORE, instance.SOPInstanceUID, encoded(instance))
        assert status == 0x0000, f"an honest instance was answered 0x{status:04X}"
    return time.monotonic() - started


def soak(watched: Watched, *, seconds: float, seed: int, said: Callable[[str], None] = print) -> dict[str, object]:
    """Attack for so long; return what was seen, and raise AssertionError where something was wrong."""
    attacks, endings, stop = Attacks(watched.port), Counter[str](), threading.Event()
    surprises: list[str] = []

    def attack(number: int) -> None:
        chance = random.Random(f"{seed} {number}")
        while not stop.is_set():
            which = chance.choice(attacks.all)
            try:
                ending = which(chance)
            except OSError:
                ending = "not connected"
            except Silence:
                ending = "silence"
            endings[ending] += 1
            if ending in ("silence", "ended instead of a status"):
                surprises.append(f"{which.__name__}: {ending}")

    honest(watched.port, 0)
    before = (watched.threads, watched.descriptors)
    threads = [threading.Thread(target=attack, args=(number,), daemon=True) for number in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    started, number, slowest, warm = time.monotonic(), 1, 0.0, 0.0
    try:
        while (now := time.monotonic() - started) < seconds:
            took = honest(watched.port, number)
            slowest, number = max(slowest, took), number + 1
            assert took < PROMPT, f"an honest sender waited {took:.1f} s"
            if not warm and now > min(60.0, seconds / 2):
                warm = watched.megabytes
            if number % 20 == 0:
                said(f"{now:.0f} s, {sum(endings.values())} attacks, {watched.megabytes:.0f} MB")
            time.sleep(EVERY)
    finally:
        stop.set()
        for thread in threads:
            thread.join(LONGEST + 20)
    watched.settle(threads=before[0], descriptors=before[1], seconds=30.0)
    log = watched.node.log()
    seen: dict[str, object] = {
        "attacks": sum(endings.values()),
        "endings": dict(endings),
        "honest": number,
        "slowest honest, s": round(slowest, 2),
        "MB after warm-up": round(warm),
        "MB at the end": round(watched.megabytes),
        "threads": (before[0], watched.threads),
        "descriptors": (before[1], watched.descriptors),
        "surprises": surprises[:20],
    }
    assert "Traceback" not in log, seen
    assert ".defect" not in log, seen
    assert watched.megabytes - warm < MAY_GROW, seen
    assert not surprises, seen
    return seen


def started_node(folder: Path) -> NodeProcess:
    """Return a node without routes, patient with nobody."""
    node = NodeProcess(folder / "node", pacs_port=free_port())
    text = node.settings_path.read_text().replace("[receive]\nminimum_free_megabytes = 10\n", _SETTINGS)
    node.settings_path.write_text(text.partition("[[route]]")[0])
    return node.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    wanted = parser.parse_args()
    print(f"seed {wanted.seed}")
    with tempfile.TemporaryDirectory() as folder:
        node = started_node(Path(folder))
        try:
            for name, value in soak(Watched(node), seconds=wanted.minutes * 60, seed=wanted.seed).items():
                print(f"{name}: {value}")
        except BaseException:
            with suppress(OSError):
                lines = [line for line in node.log().splitlines() if "defect" in line or "Traceback" in line]
                print("\n".join(lines[:10]), file=sys.stderr)
            raise
        finally:
            node.end()


if __name__ == "__main__":
    main()
