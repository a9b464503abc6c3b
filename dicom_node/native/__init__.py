"""What is done in C because a thousand instances a second do it: see `take.c`, and what it calls.

Everything here is also done in Python, by those who call it: for TLS, for what is out of the ordinary, and where the
package was installed without a C compiler. `is_there` says which it is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_VERSION = 7  # of the library that these declarations fit
_LIBRARY = Path(__file__).with_name("library.so")
_OFF = "DICOM_NODE_NATIVE"  # set to 0: do without
_SHORT = 1 << 20  # bytes; of nothing but empty elements they take half a millisecond
_SCANS: list[Any] = [
    *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int),
    *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p),
]
GONE, LATE, VIOLATION, PROGRESS, FULL, WHOLE, LANDED = -1, -2, -3, 0, 1, 2, 3
_UNSENT = -4
LONGEST_RUN = 16  # instances
_TOLD = struct.Struct("=QLL16s")  # `struct told` of take.c
_TOLD_SIZE = 2048  # bytes for each, with what follows it

Bytes = bytes | bytearray | memoryview


class _Flow(ctypes.Structure):
    """`struct flow` of receive.c."""

    _fields_ = [
        ("timeout", ctypes.c_int64),
        ("longest_pdu", ctypes.c_uint32),
        ("connection", ctypes.c_int32),
        ("in_pdu", ctypes.c_uint32),
        ("left", ctypes.c_uint32),
        ("context_id", ctypes.c_uint8),
        ("is_last", ctypes.c_uint8),
        ("has", ctypes.c_uint8),
        ("head", ctypes.c_uint8 * 12),
        ("deadline", ctypes.c_int64),
    ]


class _Run(ctypes.Structure):
    """`struct run` of take.c."""

    _fields_ = [
        ("memory", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("ahead", ctypes.c_void_p),
        ("ahead_size", ctypes.c_size_t),
        ("command", ctypes.c_char_p),
        ("command_length", ctypes.c_size_t),
        ("before", ctypes.c_char_p),
        ("behind", ctypes.c_char_p),
        ("before_length", ctypes.c_size_t),
        ("behind_length", ctypes.c_size_t),
        ("wanted", ctypes.c_void_p),
        ("found", ctypes.c_void_p),
        ("files", ctypes.c_void_p),
        ("told", ctypes.c_void_p),
        ("expected", ctypes.c_size_t),
        ("filled", ctypes.c_size_t),
        ("has", ctypes.c_ssize_t),
        ("number", ctypes.c_int32),
        ("most", ctypes.c_int32),
        ("landed", ctypes.c_int32),
        ("linger", ctypes.c_int32),
        ("is_implicit", ctypes.c_int32),
    ]


def _load() -> ctypes.CDLL | None:
    if os.environ.get(_OFF) == "0":
        return None
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        if library.dicom_node_version() != _VERSION:
            return None
    except (OSError, AttributeError):
        return None
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.dicom_node_exchange.argtypes = [ctypes.c_int, address, size, ctypes.c_int, address, size]
    library.dicom_node_exchange.restype = ctypes.c_ssize_t
    library.dicom_node_fragments.argtypes = [address, address, size, address]
    library.dicom_node_take.argtypes = [address, address]
    library.dicom_node_land.argtypes = [ctypes.c_int, address, size, ctypes.c_int, address, size]
    library.dicom_node_scan.argtypes = _SCANS
    library.dicom_node_link.argtypes = library.dicom_node_unlink.argtypes = [address, size]
    library.dicom_node_create.argtypes = [address, size, ctypes.c_uint, address]
    for names in (library.dicom_node_link, library.dicom_node_unlink, library.dicom_node_create):
        names.restype = size
    return library


def _load_locked() -> Any:
    """Return what is so short that it keeps the interpreter's lock: to have it again would take longer."""
    library = ctypes.PyDLL(str(_LIBRARY))
    library.dicom_node_scan.argtypes = _SCANS
    return library


_Byte = ctypes.c_char
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_VRS = {ord(first) | ord(second) << 8: first + second for first in _LETTERS for second in _LETTERS}
_library = _load()
is_there = _library is not None
_locked: Any = _load_locked() if is_there else None


def address(view: Bytes) -> int:
    """Return where bytes begin in memory; they must stay there for as long as it is used."""
    if not len(view):
        return 0
    try:
        return ctypes.addressof(_Byte.from_buffer(view))
    except TypeError:  # it may not be written to
        return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def may_flow(connection: Any) -> bool:
    """Return whether C may read from a connection: a plain socket, on which the kernel limits a wait."""
    return _library is not None and type(connection) is socket.socket and connection.gettimeout() is None


@dataclass(slots=True)
class Reply:
    """What a peer is to be told as soon as something is durable."""

    connection: socket.socket
    content: bytes
    is_sent: bool = False


class Plan(NamedTuple):
    """What C has to know to take instances that are alike from their connection to the disk."""

    descriptors: Sequence[int]  # of files that are empty, one for each, `LONGEST_RUN` at most
    memory: memoryview  # it begins at a page boundary; each goes through it
    before: bytes  # what stands in the meta information before the element that names the instance
    behind: bytes  # and behind it, up to the length of the last value, which ends with the digest
    expected: int  # bytes of the first data set, perhaps
    is_implicit: bool
    wanted: Wanted


class Landed(NamedTuple):
    """An instance that is durable, and acknowledged where the peer still listens."""

    size: int  # bytes of the data set
    lead: int  # bytes before it
    digest: bytes
    values: bytes  # the elements that were wanted, all but the last: each its tag, its length, 4 bytes each, and value


class Taken(NamedTuple):
    """How far C got."""

    reason: int  # as of `Flow.fragments`, of the instance after those that landed; LANDED: none was begun
    filled: int = 0  # bytes of the data set of that
    landed: Sequence[Landed] = ()
    ahead: bytes = b""  # the request of that one, unless it is the first; or the beginning of the next message


class Flow:
    """Reads the messages of one connection, for one thread."""

    def __init__(self, connection: socket.socket, *, longest_pdu: int, timeout: float, ahead: memoryview) -> None:
        """Read from `connection`, which `may_flow`; `timeout` is what a PDU may take, in seconds.

        `ahead` is memory for the beginning of a message, in use while `exchange` is.
        """
        self._library: Any = _library
        self._connection = connection
        self._flow = _Flow(timeout=int(timeout * 1e9), longest_pdu=longest_pdu)
        self._at = ctypes.addressof(self._flow)
        self._filled = ctypes.c_size_t()
        self._filled_at = ctypes.addressof(self._filled)
        self._ahead, self._ahead_at = ahead, address(ahead)
        self._run = _Run(ahead=self._ahead_at, ahead_size=len(ahead))
        self._run_at = ctypes.addressof(self._run)
        self._memory: memoryview | None = None  # that `_run` knows of
        self._found: Any = None
        self._files = (ctypes.c_int32 * LONGEST_RUN)()
        self._told = bytearray()

    def exchange(self, answer: bytes, seconds: float) -> bytes | None:
        """Send `answer`, if there is one; return the beginning of the next message, if it comes in time.

        That is its first fragment at most. Empty where nothing comes within `seconds`, None where there is no
        connection any more.
        """
        got = self._library.dicom_node_exchange(
            *(self._connection.fileno(), answer, len(answer)),
            *(int(seconds * 1000), self._ahead_at, len(self._ahead)),
        )
        return None if got < 0 else bytes(self._ahead[:got])

    def begin_data_set(self, context_id: int, in_pdu: int, deadline: float) -> None:
        """Begin to read a data set, in a PDU of which `in_pdu` bytes are left, until `deadline` on `time.monotonic`."""
        flow = self._flow
        flow.connection = self._connection.fileno()
        flow.context_id, flow.in_pdu, flow.deadline = context_id, in_pdu, int(deadline * 1e9)
        flow.left = flow.is_last = flow.has = 0

    def fragments(self, room: memoryview, filled: int) -> tuple[int, int]:
        """Read fragments of the data set into `room` from `filled` on; return why it stopped, and what is filled now.

        WHOLE: the data set is; FULL: the room is; PROGRESS: a second has passed; else the connection is of no more use.
        """
        self._filled.value = filled
        reason = self._library.dicom_node_fragments(self._at, address(room), len(room), self._filled_at)
        return reason, self._filled.value

    def take(self, plan: Plan, *, command: bytes, linger: float) -> Taken:
        """Make durable, and acknowledge, the data set of a C-STORE whose command set has been read, and those after it.

        They follow one another within `linger` seconds, are like the first, and have nothing out of the ordinary.
        LANDED: all that was begun has been acknowledged. Anything else: the peer has gone, or so many bytes of the next
        lie behind its lead, and nothing else has been done with it.
        """
        run = self._run
        if plan.memory is not self._memory:
            self._prepare(plan.memory, plan.wanted)
        run.before, run.before_length = plan.before, len(plan.before)
        run.behind, run.behind_length = plan.behind, len(plan.behind)
        run.command, run.command_length = command, len(command)
        run.expected, run.is_implicit, run.linger = plan.expected, plan.is_implicit, int(linger * 1000)
        run.most = len(plan.descriptors)
        self._files[: run.most] = list(plan.descriptors)
        reason = self._library.dicom_node_take(self._at, self._run_at)
        landed = [self._landed(at) for at in range(0, run.landed * _TOLD_SIZE, _TOLD_SIZE)]
        return Taken(reason, run.filled, landed, bytes(self._ahead[: max(0, run.has)]))

    def _landed(self, at: int) -> Landed:
        size, lead, values, digest = _TOLD.unpack_from(self._told, at)
        at += _TOLD.size
        return Landed(size, lead, digest, bytes(self._told[at : at + values]))

    def _prepare(self, memory: memoryview, wanted: Wanted) -> None:
        """Say what is the same for all instances of a connection."""
        run, self._memory, self._found = self._run, memory, wanted.places()
        self._told = bytearray(LONGEST_RUN * _TOLD_SIZE)
        run.memory, run.size = address(memory), len(memory)
        run.wanted, run.number, run.found = wanted.at, len(wanted), ctypes.addressof(self._found)
        run.files, run.told = ctypes.addressof(self._files), address(self._told)

    @property
    def in_pdu(self) -> int:
        """Return how many bytes of the present PDU are still to be read, once the data set is whole."""
        return int(self._flow.in_pdu)


def land(descriptor: int, content: memoryview, reply: Reply | None = None) -> bool:
    """Write a whole file, make it durable, and close it; then send `reply`. `content` begins at a page boundary.

    False: not done, and the usual way has to do it. Raises OSError where the disk does not take it.
    """
    if _library is None:
        return False
    connection, answer = (-1, b"") if reply is None else (reply.connection.fileno(), reply.content)
    wrong = _library.dicom_node_land(descriptor, address(content), len(content), connection, answer, len(answer))
    if wrong in (errno.EINVAL, errno.EAGAIN):
        return False
    if wrong > 0:
        raise OSError(wrong, os.strerror(wrong))
    if reply is not None:
        reply.is_sent = wrong != _UNSENT
    return True


def has_name(descriptor: int) -> bool:
    """Return whether a file that is open still has a name."""
    return bool(os.fstat(descriptor).st_nlink if _library is None else _locked.dicom_node_has_name(descriptor))


def link(pairs: Sequence[tuple[str, str]]) -> int:
    """Give files second names, pairs of a name that there is and a new one; return how many have theirs, in order."""
    return 0 if _library is None else int(_library.dicom_node_link(_paths(chain.from_iterable(pairs)), len(pairs)))


def unlink(paths: Sequence[str]) -> int:
    """Take names away; return how many are gone, in order."""
    return 0 if _library is None else int(_library.dicom_node_unlink(_paths(paths), len(paths)))


def create(paths: Sequence[str], mode: int) -> list[int]:
    """Make files that are not there yet; return the descriptors of those that are made, in order."""
    if _library is None:
        return []
    descriptors = (ctypes.c_int * len(paths))()
    return descriptors[: _library.dicom_node_create(_paths(paths), len(paths), mode, descriptors)]


def _paths(paths: Iterable[str]) -> bytes:
    return os.fsencode("\0".join(paths)) + b"\0"


class Wanted:
    """Elements to be looked for by `scan`."""

    def __init__(self, tags: Collection[int]) -> None:
        """Look for these."""
        self._tags = np.array(sorted(tags), np.uint32)
        self.at = address(self._tags.data.cast("B")) if len(tags) else 0
        self.places = ctypes.c_int64 * (4 * len(tags))  # room for each

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self._tags)

    def scan(
        self, view: Bytes, is_implicit: bool, stop_at: int, *, is_whole: bool
    ) -> list[tuple[int, tuple[str, int, int]]] | None:
        """Return each tag and its VR ("" where implicit), offset and length, ascending; None where C gives up."""
        if _library is None:
            return None
        found = self.places()
        library: Any = _locked if len(view) <= _SHORT else _library
        number = library.dicom_node_scan(
            *(address(view), len(view), is_implicit, self.at, len(self._tags)),
            *(stop_at, is_whole, found),
        )
        if number < 0:
            return None
        numbers = iter(found[: 4 * number])
        places = zip(numbers, numbers, numbers, numbers, strict=True)
        return [(tag, (_VRS.get(vr, ""), offset, length)) for tag, vr, offset, length in places]
