"""What stands between the node's processes and their disk and clock (`shim.c`), from the test's side."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("shim.c")
_CONTROL = struct.Struct("=4Q4Iq256s512s")
_RECORD = struct.Struct("=QqQqIII8s12s")
_COUNT, _MATCHED, _AT, _SPAN, _ACT, _ERROR, _DEAD, _JOURNAL, _CLOCK, _PATTERN, _ACTED = range(11)
_OFFSETS = (0, 8, 16, 24, 32, 36, 40, 44, 48, 56, 312)
_FORMATS = ("Q", "Q", "Q", "Q", "I", "I", "I", "I", "q", "256s", "512s")
FOREVER = 2**63


class Act(IntEnum):
    """What is done at an operation."""

    KILL_BEFORE = 1  # SIGKILL to the process, before it
    KILL_AFTER = 2
    FAIL = 3  # with an errno, and nothing is done
    POWER_CUT = 4  # after it, SIGKILL to every process of the node, at its next operation at the latest


@dataclass(frozen=True, slots=True)
class Operation:
    """One durable operation that was done; `path` and `other` are relative to the storage folder."""

    number: int
    role: str  # node, infer or deliver
    name: str
    path: str
    other: str
    inode: int
    offset: int
    data: bytes

    @property
    def line(self) -> str:
        """Return it as patterns see it."""
        return f"{self.role} {self.name} {self.other or self.path}"


def build(folder: Path) -> Path:
    """Return the shim, compiled; skip where there is no compiler for C."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        message = "no C compiler (apt-get install gcc libc6-dev)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    made = folder / "shim.so"
    command = [compiler, "-std=gnu11", "-O1", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return made


class Shim:
    """The control file and the journal of one node's processes."""

    def __init__(self, library: Path, folder: Path, *, root: Path, journal: bool = False) -> None:
        """Watch over `root`, with the two files in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.root = root.resolve()
        self.journal = folder / "journal"
        self.journal.touch()
        control = folder / "control"
        control.write_bytes(bytes(_CONTROL.size))
        with control.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _CONTROL.size)
        self._put(_JOURNAL, int(journal))
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAULT_ROOT": str(self.root),
            "FAULT_CONTROL": str(control),
            "FAULT_JOURNAL": str(self.journal),
        }

    def _put(self, field: int, value: int | bytes) -> None:
        struct.pack_into("=" + _FORMATS[field], self._memory, _OFFSETS[field], value)

    def _get(self, field: int) -> int | bytes:
        return struct.unpack_from("=" + _FORMATS[field], self._memory, _OFFSETS[field])[0]

    def arm(self, act: Act, pattern: str = "*", *, at: int = 1, span: int = 1, error: int = 0) -> None:
        """Do `act` at the match number `at` of `pattern` from now on, and at `span` matches in all."""
        self.disarm()
        for field, value in ((_PATTERN, pattern.encode()), (_ACT, act), (_ERROR, error), (_SPAN, span)):
            self._put(field, value)
        self._put(_MATCHED, 0)
        self._put(_ACTED, b"")
        self._put(_AT, at)

    def disarm(self) -> None:
        """Do nothing any more; the power is on."""
        self._put(_AT, 0)
        self._put(_DEAD, 0)

    @property
    def count(self) -> int:
        """Return how many durable operations there were."""
        return int(self._get(_COUNT))

    @property
    def acted(self) -> str:
        """Return what something was done to, the last time since `arm`; empty: nothing yet."""
        return bytes(self._get(_ACTED)).rstrip(b"\0").decode(errors="replace")

    def set_clock(self, seconds: int) -> None:
        """Add `seconds` to the time of day of every process, from now on."""
        self._put(_CLOCK, seconds)

    def operations(self) -> list[Operation]:
        """Return what the journal holds, in the order in which it was done."""
        return list(_read(self.journal.read_bytes()))


def _read(content: bytes) -> Iterator[Operation]:
    place = 0
    while place + _RECORD.size <= len(content):
        number, _answer, inode, offset, path, other, data, role, name = _RECORD.unpack_from(content, place)
        place += _RECORD.size
        parts = []
        for size in (path, other, data):
            parts.append(content[place : place + size])
            place += size
        yield Operation(
            number,
            role.rstrip(b"\0").decode(),
            name.rstrip(b"\0").decode(),
            parts[0].decode(),
            parts[1].decode(),
            inode,
            offset,
            parts[2],
        )


def steps(operations: Sequence[Operation]) -> list[str]:
    """Return each kind of operation once, as a pattern: UIDs, digests and random names are `*`."""
    return list(dict.fromkeys(_kind(operation) for operation in operations))


def _kind(operation: Operation) -> str:
    *folders, name = (operation.other or operation.path).split("/")
    if not folders and name.partition(".")[0] in {"ledger", "node", "", "studies", "results", "incoming", "arrived"}:
        return operation.line
    known = [folder if folder.isalpha() and len(folder) > 2 else "*" for folder in folders]
    ending = ".dcm" if name.endswith(".dcm") else ""
    return f"{operation.role} {operation.name} {'/'.join([*known, '*' + ending])}"
