"""close, dup and their kin. After one of our files was closed its release is waited for: it has happened when the call
returns, as in the kernel. A duplicate of ours gets a number where the filter finds it.
"""

from __future__ import annotations

import errno
import os

from guestmem.serve.files import GmemFile
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.descriptors import as_int, file_at
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import Result, Tracee, Work
from guestmem.serve.seccomp.user_memory import take_descriptor

_F_DUPFD, _F_SETFL, _F_SETLEASE, _F_DUPFD_CLOEXEC, _F_ADD_SEALS, _F_GET_SEALS = 0, 4, 1024, 1030, 1033, 1034
_F_UNLCK = 2
_O_DIRECT = 0o40000
_CLOSE_RANGE_UNSHARE, _CLOSE_RANGE_CLOEXEC = 2, 4


def _close(tracee: Tracee, call: SystemCall) -> Work:
    fd = call.arguments[0]
    if file_at(tracee, fd) is None:
        return None
    tracee.supervisor.known.forget()
    return tracee.close_by(Nr.CLOSE, fd)


def _close_range(tracee: Tracee, call: SystemCall) -> Work:
    first, last, flags = (word & 0xFFFF_FFFF for word in call.arguments[:3])
    if flags & _CLOSE_RANGE_CLOEXEC or first > last:
        return None
    numbers = [int(name) for name in os.listdir(f"/proc/{tracee.tid}/fd")]
    if any(first <= number <= last and file_at(tracee, number) is not None for number in numbers):
        tracee.supervisor.known.forget()
        return tracee.close_by(Nr.CLOSE_RANGE, first, last, flags)
    return None


def _dup(tracee: Tracee, call: SystemCall) -> Work:
    fd = call.arguments[0]
    return _duplicate(tracee, fd, 0, cloexec=False) if file_at(tracee, fd) is not None else None


async def _duplicate(tracee: Tracee, fd: int, at_least: int, cloexec: bool) -> Result:
    try:
        copy = take_descriptor(tracee.tgid, as_int(fd))
    except OSError:
        return -errno.EBADF
    return await tracee.install(copy, cloexec, at_least)


def _dup_onto(tracee: Tracee, call: SystemCall) -> Work:
    """What `to` was is closed by that."""
    from_, to = as_int(call.arguments[0]), as_int(call.arguments[1])
    if from_ == to or file_at(tracee, to) is None:
        return None
    tracee.supervisor.known.forget()
    return tracee.close_by(Nr(call.number), *call.arguments[:3])


def _fcntl(tracee: Tracee, call: SystemCall) -> Work:
    fd, command, argument = call.arguments[0], as_int(call.arguments[1]), call.arguments[2]
    file = file_at(tracee, fd)
    if file is None:
        return None
    if command in (_F_DUPFD, _F_DUPFD_CLOEXEC):
        limit = 1 << 20
        if not 0 <= as_int(argument) < limit:
            return None
        return _duplicate(tracee, fd, as_int(argument), cloexec=command == _F_DUPFD_CLOEXEC)
    return _control_gmem(command, argument) if isinstance(file, GmemFile) else None


def _control_gmem(command: int, argument: int) -> int | None:
    if command in (_F_ADD_SEALS, _F_GET_SEALS) or (command == _F_SETFL and argument & _O_DIRECT):
        return -errno.EINVAL
    if command == _F_SETLEASE and as_int(argument) != _F_UNLCK:
        return -errno.EAGAIN
    return None


TABLE = {
    Nr.CLOSE: _close,
    Nr.CLOSE_RANGE: _close_range,
    Nr.DUP: _dup,
    Nr.DUP2: _dup_onto,
    Nr.DUP3: _dup_onto,
    Nr.FCNTL: _fcntl,
}
