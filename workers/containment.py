"""What a model that is not trusted with the node may not do, applied by a process to itself, for good."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import site
import struct
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from workers import landlock, syscalls

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_FILTER = 2
_EFAULT = 14
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITIES_3 = 0x20080522
_OPEN_FILES = 1024
_SLACK = 1 << 30  # address space that libraries reserve and never touch
_THREADS = 1 << 25  # the same, for each processor: threads of OpenMP and of torch, with a stack of 8 MiB each

# what the C library, Python, torch and CUDA's driver read of the system
_SYSTEM = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/cuda",
    "/usr/local/nvidia",
    "/usr/share/zoneinfo",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/version",
    "/proc/devices",
    "/proc/driver/nvidia",
    "/proc/sys/vm",
    "/sys/devices",
    "/sys/bus",
    "/sys/class",
    "/sys/module",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
)


@dataclass(frozen=True, slots=True)
class Walls:
    """What this machine can be shut in with: the version of Landlock (0: none) and whether there is seccomp."""

    landlock: int
    seccomp: bool

    @property
    def missing(self) -> str:
        """Return in words what the kernel lacks; empty where nothing."""
        lacking = [] if self.landlock else ["Landlock (Linux 5.13, with `landlock` among the kernel's LSMs)"]
        return " and ".join(lacking if self.seccomp else [*lacking, "seccomp filters (x86_64 or aarch64)"])


@dataclass(frozen=True, slots=True)
class Cell:
    """What is left to a process: folders that it may read, list (names alone) and write; bytes of memory and files.

    `memory` is 0 where the address space must not be limited: CUDA reserves more of it than there is.
    """

    reads: tuple[str, ...]
    lists: tuple[str, ...]
    writes: tuple[str, ...]
    memory: int
    files: int


def walls() -> Walls:
    """Return what this machine can be shut in with; asks the kernel, changes nothing."""
    if sys.platform != "linux":
        return Walls(0, False)
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, None, 0, 0)  # no filter: fails, and how tells
    return Walls(landlock.version(), ctypes.get_errno() == _EFAULT and syscalls.is_known())


def installation() -> tuple[str, ...]:
    """Return where Python and its packages lie, and of a checkout the node's own two packages.

    Not all of a prefix: whoever keeps the node's data beside its environment keeps it from its models all the same.
    """
    own = Path(__file__).resolve().parent
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [os.path.join(prefix, name) for prefix in (sys.prefix, sys.base_prefix) for name in ("lib", "lib64")]
    paths += [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    paths += [str(own), str(own.parent / "dicom_node")]
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths))


def die_with_parent(parent: int) -> None:
    """End this process when the thread that started it ends, at once where its process has gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def confine(cell: Cell, found: Walls) -> None:
    """Shut this process in `cell`, by the walls that there are; there is no way back.

    Must come before the process has threads: each would keep what it had. Raises OSError where the kernel refuses.
    """
    _limit(cell)
    if sys.platform != "linux":
        return
    if len(os.listdir("/proc/self/task")) != 1:
        raise OSError("a process with threads cannot be contained")
    library = ctypes.CDLL(None, use_errno=True)
    _drop_capabilities(library)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    if found.landlock:
        landlock.restrict(_places(cell))
    if found.seccomp:
        _filter(library)


def _places(cell: Cell) -> Iterator[tuple[Path, int]]:
    for paths, rights in (
        ((*_SYSTEM, *cell.reads), landlock.READ),
        (cell.lists, landlock.LIST),
        (cell.writes, landlock.WRITE),
        (_devices(), landlock.DEVICE),
    ):
        for path in paths:
            yield Path(path), rights


def _devices() -> Sequence[str]:
    return ["/dev/null", *(str(path) for path in Path("/dev").glob("nvidia*"))]


def _limit(cell: Cell) -> None:
    """Set the limits that cannot be raised again.

    The number of processes is not among them: the system counts all those of a user, and root's not at all. The
    filter lets none be started.
    """
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, cell.files), (resource.RLIMIT_NOFILE, _OPEN_FILES)]
    if cell.memory:
        limits.append((resource.RLIMIT_DATA, cell.memory + _SLACK + _THREADS * (os.cpu_count() or 1)))
    for kind, value in limits:
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))


def _drop_capabilities(library: ctypes.CDLL) -> None:
    """Leave root, too, no more than the owner of its files."""
    number = _CAPSET.get(os.uname().machine)
    if number is not None:
        header, none = struct.pack("=Ii", _CAPABILITIES_3, 0), bytes(24)
        library.syscall(number, header, none)


def _filter(library: ctypes.CDLL) -> None:
    program = ctypes.create_string_buffer(syscalls.program(os.getpid()))
    count = (len(program) - 1) // 8
    header = ctypes.create_string_buffer(struct.pack("@HP", count, ctypes.addressof(program)))
    if library.prctl(_PR_SET_SECCOMP, _SECCOMP_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
