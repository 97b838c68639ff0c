"""Which system calls are notified. All others, and of these the harmless forms, run at the kernel's own speed.

Our descriptors get numbers from `first_fd` on, so that the many calls on other descriptors are told apart by a
comparison. What finds one of ours below that (dup2, SCM_RIGHTS) are ioctl, by its number, mmap, fallocate and
ftruncate; the other calls on such a number reach the memfd or the socket behind it.

munmap, mremap and mprotect are always notified, for nobody knows beforehand where a VM's memory will be.
"""

from __future__ import annotations

from guestmem.serve.seccomp.bpf import (
    ALLOW,
    AND,
    JUMP_ANY_BIT,
    JUMP_EQUAL,
    JUMP_GREATER_EQUAL,
    LOAD,
    NOTIFY,
    RETURN,
    Step,
    argument_high,
    argument_low,
    assemble,
)
from guestmem.serve.seccomp.numbers import Nr

ARCH = 0xC000003E
"""AUDIT_ARCH_X86_64."""
_ARCH_AT, _NUMBER_AT = 4, 0
_NEGATIVE = 1 << 31
_MAP_FIXED, _MAP_ANONYMOUS = 0x10, 0x20
_DISCARDING = (4, 8, 9, 14, 24, 25)
"""MADV_DONTNEED, FREE, REMOVE, HUGEPAGE, DONTNEED_LOCKED, COLLAPSE."""
_IOCTL_TYPES = (0xAE00, 0xAF00, ord("g") << 8, ord(";") << 8)
_UFFDIO_REGISTER = 0xAA00

ALWAYS = (
    Nr.OPEN,
    Nr.OPENAT,
    Nr.OPENAT2,
    Nr.ACCESS,
    Nr.FACCESSAT,
    Nr.FACCESSAT2,
    Nr.READLINK,
    Nr.READLINKAT,
    Nr.FALLOCATE,
    Nr.TRUNCATE,
    Nr.FTRUNCATE,
    Nr.MUNMAP,
    Nr.MREMAP,
    Nr.MPROTECT,
    Nr.PKEY_MPROTECT,
    Nr.MSYNC,
)
ON_FIRST_FD = (
    Nr.READ,
    Nr.WRITE,
    Nr.READV,
    Nr.WRITEV,
    Nr.PREAD64,
    Nr.PWRITE64,
    Nr.PREADV,
    Nr.PWRITEV,
    Nr.PREADV2,
    Nr.PWRITEV2,
    Nr.LSEEK,
    Nr.CLOSE,
    Nr.DUP,
    Nr.FCNTL,
    Nr.FSYNC,
    Nr.FDATASYNC,
    Nr.READAHEAD,
    Nr.FCHMOD,
    Nr.FCHOWN,
    Nr.UTIMENSAT,
    Nr.FSETXATTR,
    Nr.FGETXATTR,
    Nr.FLISTXATTR,
    Nr.FREMOVEXATTR,
    Nr.FSTATFS,
    Nr.FSTAT,
    Nr.NAME_TO_HANDLE_AT,
)
ON_FIRST_OR_SECOND_FD = (Nr.DUP2, Nr.DUP3, Nr.SENDFILE)
ON_FIRST_OR_THIRD_FD = (Nr.SPLICE, Nr.COPY_FILE_RANGE)
BY_FD_OR_PATH = (Nr.NEWFSTATAT, Nr.STATX)
BY_PATH = (Nr.STAT, Nr.LSTAT)


def build(first_fd: int, cookie: int, paths: bool) -> bytes:
    """The filter. `cookie`, in the high half of the fifth argument, marks the calls that we make a thread do: it is not
    asked about them (no call of those has anything there: see `Tracee.inject`). `paths`: stat() of a path is
    notified, because the machine has no device of that name."""
    by_path = "notify" if paths else "first fd"
    cases: list[tuple[int, str]] = [
        (Nr.IOCTL, "ioctl"),
        (Nr.MMAP, "mmap"),
        (Nr.MADVISE, "madvise"),
        (Nr.CLOSE_RANGE, "close_range"),
        *((number, "notify") for number in ALWAYS),
        *((number, "first fd") for number in ON_FIRST_FD),
        *((number, "first or second fd") for number in ON_FIRST_OR_SECOND_FD),
        *((number, "first or third fd") for number in ON_FIRST_OR_THIRD_FD),
        *((number, by_path) for number in BY_FD_OR_PATH),
        *((number, "notify") for number in BY_PATH if paths),
    ]
    return assemble(
        [
            Step(LOAD, _ARCH_AT),
            Step(JUMP_EQUAL, ARCH, no="allow"),
            Step(LOAD, _NUMBER_AT),
            *(Step(JUMP_EQUAL, number, yes=label) for number, label in cases),
            "allow",
            Step(RETURN, ALLOW),
            "ioctl",
            Step(LOAD, argument_low(1)),
            Step(AND, 0xFFFF),
            Step(JUMP_EQUAL, _UFFDIO_REGISTER, yes="notify"),
            Step(AND, 0xFF00),
            *(Step(JUMP_EQUAL, kind, yes="notify") for kind in _IOCTL_TYPES),
            *_is_ours(0, first_fd, otherwise="allow it"),
            "mmap",
            Step(LOAD, argument_low(3)),
            Step(JUMP_ANY_BIT, _MAP_ANONYMOUS, no="notify"),
            Step(JUMP_ANY_BIT, _MAP_FIXED, yes="notify", no="allow it"),
            "madvise",
            Step(LOAD, argument_low(2)),
            *(Step(JUMP_EQUAL, advice, yes="notify") for advice in _DISCARDING),
            Step(RETURN, ALLOW),
            "close_range",
            Step(LOAD, argument_low(1)),
            Step(JUMP_GREATER_EQUAL, first_fd, yes="notify", no="allow it"),
            "first or second fd",
            *_is_ours(1, first_fd, otherwise="first fd"),
            "first or third fd",
            *_is_ours(2, first_fd, otherwise="first fd"),
            "first fd",
            *_is_ours(0, first_fd, otherwise="allow it"),
            "allow it",
            Step(RETURN, ALLOW),
            "notify",
            Step(LOAD, argument_high(4)),
            Step(JUMP_EQUAL, cookie, yes="let through"),
            Step(RETURN, NOTIFY),
            "let through",
            Step(RETURN, ALLOW),
        ]
    )


def _is_ours(argument: int, first_fd: int, otherwise: str) -> list[Step]:
    return [
        Step(LOAD, argument_low(argument)),
        Step(JUMP_GREATER_EQUAL, _NEGATIVE, yes=otherwise),
        Step(JUMP_GREATER_EQUAL, first_fd, yes="notify", no=otherwise),
    ]
