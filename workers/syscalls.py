"""Which system calls a contained model may not make, as a seccomp filter written by hand."""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000  # from here on x86_64 counts the calls of its 32-bit twin, which would be a way round the list
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_CLONE_THREAD = 0x00010000
_F_SETOWN, _F_SETOWN_EX = 8, 15
_PR_SET_PDEATHSIG = 1

# by name: the number on x86_64 and on aarch64, None where that machine has no such call
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # the network, of every family
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # other programs
    "execve": (59, 221),
    "execveat": (322, 281),
    # other processes: their memory, their descriptors, their life, their time
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # memory that belongs to no process, and so is not counted, or is shared with others
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # what Landlock does not hold: a file's mode, owner, attributes and times; its length before Linux 6.2
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # the machine
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "fanotify_init": (300, 262),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "fork": (57, None),
    "vfork": (58, None),
}
_NUMBERS = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "fcntl": (72, 25),
    "prctl": (157, 167),
}


@dataclass(frozen=True, slots=True)
class _Instruction:
    """One line of a classic BPF program: what to do, how far to jump if true and if false, and a number."""

    code: int
    if_true: int
    if_false: int
    number: int

    def packed(self) -> bytes:
        """Return it as `struct sock_filter`."""
        return struct.pack("=HBBI", self.code, self.if_true, self.if_false, self.number)


def _load(offset: int) -> _Instruction:
    return _Instruction(0x20, 0, 0, offset)


def _equal(number: int, if_true: int, if_false: int) -> _Instruction:
    return _Instruction(0x15, if_true, if_false, number)


def _at_least(number: int, if_true: int, if_false: int) -> _Instruction:
    return _Instruction(0x35, if_true, if_false, number)


def _any_bit(number: int, if_true: int, if_false: int) -> _Instruction:
    return _Instruction(0x45, if_true, if_false, number)


def _answer(value: int) -> _Instruction:
    return _Instruction(0x06, 0, 0, value)


_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # offsets in struct seccomp_data, low words
_PERMITTED, _FORBIDDEN = _answer(_ALLOW), _answer(_ERRNO | errno.EPERM)
_UNKNOWN = _answer(_ERRNO | errno.ENOSYS)


def is_known(machine: str | None = None) -> bool:
    """Return whether there is a filter for `machine`, as platform.machine() names it; this one by default."""
    return (machine or platform.machine()) in _AUDIT


def program(pid: int, machine: str | None = None) -> bytes:
    """Return the filter for process `pid` as an array of `struct sock_filter`.

    What it refuses answers EPERM. It may signal itself and have threads, and no other processes.
    """
    machine = machine or platform.machine()
    column = list(_AUDIT).index(machine)
    lines = [_load(_ARCHITECTURE), _equal(_AUDIT[machine], 1, 0), _answer(_KILL), _load(_NUMBER)]
    if machine == "x86_64":
        lines += [_at_least(_X32, 0, 1), _FORBIDDEN]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            lines += [_equal(number, 0, 1), _FORBIDDEN]
    for name, check in _checks(pid).items():
        lines += [_equal(_NUMBERS[name][column], 0, len(check)), *check]
    return b"".join(line.packed() for line in [*lines, _PERMITTED])


def _checks(pid: int) -> dict[str, list[_Instruction]]:
    """Return for each call that is refused by its arguments what decides it; each ends with an answer."""
    own = [_load(_FIRST_ARGUMENT), _equal(pid, 0, 1), _PERMITTED, _FORBIDDEN]
    own_or_0 = [_load(_FIRST_ARGUMENT), _equal(0, 1, 0), _equal(pid, 0, 1), _PERMITTED, _FORBIDDEN]
    return {
        "clone": [_load(_FIRST_ARGUMENT), _any_bit(_CLONE_THREAD, 0, 1), _PERMITTED, _FORBIDDEN],
        # its flags lie in memory, where a filter cannot look; without it the C library takes clone
        "clone3": [_UNKNOWN],
        "kill": own,
        "tgkill": own,
        "prlimit64": own_or_0,
        # OpenMP tries it on itself before it counts processors: where that is forbidden it uses one
        "sched_setaffinity": own_or_0,
        # SIGIO to whoever is made a descriptor's owner ends it
        "fcntl": [_load(_SECOND_ARGUMENT), _equal(_F_SETOWN, 1, 0), _equal(_F_SETOWN_EX, 0, 1), _FORBIDDEN, _PERMITTED],
        "prctl": [_load(_FIRST_ARGUMENT), _equal(_PR_SET_PDEATHSIG, 0, 1), _FORBIDDEN, _PERMITTED],
    }


def table(machine: str) -> Iterator[tuple[str, int]]:
    """Yield name and number of every call that the filter for `machine` looks at."""
    column = list(_AUDIT).index(machine)
    for name, numbers in [*_REFUSED.items(), *_NUMBERS.items()]:
        if (number := numbers[column]) is not None:
            yield name, number
