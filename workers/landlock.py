"""Landlock: a process gives up, for good, every file that it does not name."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every machine
_VERSION = 1
_PATH_BENEATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_REFER, _TRUNCATE, _IOCTL = 1 << 13, 1 << 14, 1 << 15
_OF_FILES = 1 | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_RIGHTS_SINCE = {1: 13, 2: 14, 3: 15, 5: 16}  # how many rights each version of the kernel's interface knows
_NETWORK_SINCE, _SCOPE_SINCE = 4, 6

LIST = _READ_DIR
READ = _READ_FILE | _READ_DIR
DEVICE = READ | _WRITE_FILE | _IOCTL
WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE
"""What may be done below a path. No right runs programs or makes links, sockets and devices."""


def version() -> int:
    """Return the version of the kernel's interface, 0 where there is none."""
    try:
        answer = int(_library().syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)))
    except (OSError, AttributeError):
        return 0
    return max(answer, 0)


def restrict(places: Iterable[tuple[Path, int]]) -> None:
    """Leave this thread, and those that it starts, only `places`: each a path and what may be done below it.

    A place that does not exist is left out. Raises OSError where the kernel refuses.
    """
    rights = (1 << _RIGHTS_SINCE[max(known for known in _RIGHTS_SINCE if known <= version())]) - 1
    ruleset = _ruleset(rights)
    try:
        for path, allowed in places:
            _allow(ruleset, path, allowed & rights)
        _called(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _ruleset(rights: int) -> int:
    """Return a descriptor of rules that refuse all files, TCP, and signals and abstract sockets to others."""
    attributes = struct.pack(f"={len(list(_attributes(rights)))}Q", *_attributes(rights))
    return _called(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))


def _attributes(rights: int) -> Iterator[int]:
    yield rights
    if version() >= _NETWORK_SINCE:
        yield 0b11
    if version() >= _SCOPE_SINCE:
        yield 0b11


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        if rights:
            rule = struct.pack("=Qi", rights, descriptor)
            _called(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(descriptor)


def _called(number: int, *arguments: object) -> int:
    answer = int(_library().syscall(number, *arguments))
    if answer < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return answer


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
