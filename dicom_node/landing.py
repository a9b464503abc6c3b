"""Memory that a data set is received into, and the way of its bytes from there to the disk: past the page cache.

What is acknowledged has to be on stable storage first, so a copy in the page cache is of no use to who waits for the
answer. It costs a page to be found for every 4 kB, a copy, and the writing back, and most on a virtual machine whose
host hands out memory as it is touched. With O_DIRECT the disk takes the bytes from where the network put them, in whole
blocks (open(2)), and best from one huge page: 129 small ones are found, pinned and described to the disk one by one.
What is left of the last block goes the usual way; so does everything where the file system knows no O_DIRECT.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from typing import Protocol

from dicom_node import native

BLOCK = 4096  # bytes: what every disk and file system takes without the page cache
_SIZE = 1 << 20  # bytes: a slice of CT or MR is written at once
_HUGE = 1 << 21  # bytes of a page that the kernel and the disk take as one piece, where there are such
_MOST_IDLE = 32  # pieces of memory that are kept for the next associations

_idle: list[memoryview] = []


def memory() -> memoryview:
    """Return memory to receive into, at a page boundary; what is not touched of it takes no room."""
    return memoryview(mmap.mmap(-1, _SIZE))


def _half_a_huge_page() -> memoryview:
    """Return memory that will be borrowed again and again, and keep its neighbour for who is next."""
    arena = mmap.mmap(-1, 2 * _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without
        arena.madvise(mmap.MADV_HUGEPAGE)
    whole = memoryview(arena)
    at = -native.address(whole) % _HUGE
    with open("/dev/zero", "rb", buffering=0) as zero:  # the kernel may have to look for a whole one: nobody else waits
        zero.readinto(whole[at : at + _HUGE])
    give_back(whole[at + _SIZE : at + _HUGE])
    return whole[at : at + _SIZE]


def borrow() -> memoryview:
    """Return memory that was given back, for that costs no page faults, or else some that is new."""
    try:
        return _idle.pop()
    except IndexError:
        return _half_a_huge_page()


def give_back(memory: memoryview) -> None:
    """Let others borrow memory that nobody uses any more."""
    if len(_idle) < _MOST_IDLE:
        _idle.append(memory)


class Filling(Protocol):
    """Takes bytes where it has room for them."""

    def room(self) -> memoryview:
        """Return where the next bytes go, one at least, until `took` is called."""

    def took(self, number: int) -> None:
        """Note that so many bytes have come to where the last `room` begins."""


def pour(content: memoryview, into: Filling) -> None:
    """Copy bytes that are in memory already to where those from the network go."""
    while content:
        room = into.room()
        number = min(len(room), len(content))
        room[:number] = content[:number]
        into.took(number)
        content = content[number:]


class Landing:
    """A file that is filled from its beginning to its end, all but the `lead` at its beginning, which is written last.

    A file that holds its lead is whole, unless the power failed (its digest tells).
    """

    def __init__(self, descriptor: int, room: memoryview, *, lead: int) -> None:
        """Fill `room`, which was borrowed and nobody else uses, and write to `descriptor`, which it closes."""
        self._descriptor = descriptor
        self._memory = room
        self._memory[:lead] = bytes(lead)  # it may hold that of the file before
        self._at = 0  # where in the file the memory begins
        self._filled = lead
        self.size = lead  # bytes that the file has so far, written or not, with its lead
        self._first = b""  # the first block of a file that is longer than the memory; it goes last
        self._is_direct = False
        self._may_be_direct = True

    def room(self) -> memoryview:
        """Return where the next bytes go; there is always room for one."""
        return self._memory[self._filled :]

    def took(self, number: int) -> None:
        """Note that so many bytes have come into the room; raise OSError where the disk does not take them."""
        self._filled += number
        self.size += number
        if self._filled < len(self._memory):
            return
        if not self._at:
            self._first = bytes(self._memory[:BLOCK])
        self._write(self._memory[0 if self._at else BLOCK :], self._at or BLOCK)
        self._at, self._filled = self._at + self._filled, 0

    def whole(self) -> memoryview:
        """Return all bytes that have come; raise OSError where the disk does not take what is left of them."""
        if not self._at:
            return self._memory[: self._filled]
        self._write_rest()
        self._write(memoryview(self._first), 0, direct=False)
        return memoryview(mmap.mmap(self._descriptor, self.size, prot=mmap.PROT_READ))

    def planned(self) -> tuple[int, memoryview]:
        """Return what to write to, and all memory: before there is anything in it."""
        return self._descriptor, self._memory

    def landed(self) -> None:
        """Note that C has made all of it durable, and closed the file."""
        self._descriptor = -1

    def keep(self, lead: bytes, reply: native.Reply | None = None) -> None:
        """Write what is left, and last the lead, and close; on return all of it is durable. Raises OSError.

        `reply` is sent at once then, if it can be; it says whether it was.
        """
        if self._at:
            self._write_rest()
            first = self._memory[:BLOCK]
            first[:] = lead + self._first[len(lead) :]
            self._write(first, 0)
        else:
            self._memory[: len(lead)] = lead
            if native.land(self._descriptor, self._memory[: self._filled], reply):
                self._descriptor = -1
                return
            self._write_rest()
        os.fsync(self._descriptor)
        if not os.fstat(self._descriptor).st_nlink:  # nobody would find what is acknowledged
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self._let_go()

    def close(self) -> None:
        """Close the file, whatever has come of it."""
        self._let_go()

    def _let_go(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write_rest(self) -> None:
        """Write what is in the memory: the part of a block at its end, then the blocks before it."""
        blocks = self._filled - self._filled % BLOCK
        self._write(self._memory[blocks : self._filled], self._at + blocks, direct=False)
        self._write(self._memory[:blocks], self._at)

    def _write(self, content: memoryview, at: int, *, direct: bool = True) -> None:
        while content:
            self._pass_the_cache(direct and at % BLOCK == 0)  # the rest of what was taken in part may begin anywhere
            try:
                written = os.pwrite(self._descriptor, content, at)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._may_be_direct = False
            else:
                content, at = content[written:], at + written

    def _pass_the_cache(self, wanted: bool) -> None:
        wanted = wanted and self._may_be_direct
        if wanted == self._is_direct:
            return
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, os.O_DIRECT if wanted else 0)
            self._is_direct = wanted
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._may_be_direct = False
