"""A guest_memfd is no file to read, write or resize, though the memfd behind it is; and the other files are sockets to
nobody but us. The answers are those of Linux 6.18.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from guestmem.serve.files import GmemFile
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.descriptors import as_int, as_long, file_at
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import Result, Tracee, Work
from guestmem.serve.wire import Op

Handler = Callable[[Tracee, SystemCall], Work]
_SEEK_HOLE = 4


def _fallocate(tracee: Tracee, call: SystemCall) -> Work:
    file = file_at(tracee, call.arguments[0])
    return _allocate(tracee, file, call) if isinstance(file, GmemFile) else None


async def _allocate(tracee: Tracee, file: GmemFile, call: SystemCall) -> Result:
    _, mode, offset, length = call.arguments[:4]
    tracee.interruptible = True
    return -(await tracee.request(Op.FALLOCATE, file, mode & 0xFFFF_FFFF, offset, length)).error


def _stream(tracee: Tracee, call: SystemCall) -> Work:
    """read() and its kin: there is no such operation."""
    return -errno.EINVAL if file_at(tracee, call.arguments[0]) is not None else None


def _at_offset(tracee: Tracee, call: SystemCall) -> Work:
    """pread() and its kin: nor is there a position."""
    return _refuse_at(tracee, call.arguments[0], as_long(call.arguments[3]))


def _refuse_at(tracee: Tracee, fd: int, offset: int) -> Work:
    file = file_at(tracee, fd)
    if file is None:
        return None
    return -(errno.ESPIPE if offset >= 0 and isinstance(file, GmemFile) else errno.EINVAL)


def _seek(tracee: Tracee, call: SystemCall) -> Work:
    if not isinstance(file_at(tracee, call.arguments[0]), GmemFile):
        return None
    return -(errno.ESPIPE if 0 <= as_int(call.arguments[2]) <= _SEEK_HOLE else errno.EINVAL)


def _sendfile(tracee: Tracee, call: SystemCall) -> Work:
    to, from_, offset = call.arguments[:3]
    if file_at(tracee, from_) is not None:
        return _refuse_at(tracee, from_, 0 if offset else -1)
    return -errno.EINVAL if file_at(tracee, to) is not None else None


def _splice(tracee: Tracee, call: SystemCall) -> Work:
    ours = file_at(tracee, call.arguments[0]) or file_at(tracee, call.arguments[2])
    return -errno.EINVAL if ours is not None else None


def _copy_range(tracee: Tracee, call: SystemCall) -> Work:
    files = (file_at(tracee, call.arguments[0]), file_at(tracee, call.arguments[2]))
    return -errno.EXDEV if any(isinstance(file, GmemFile) for file in files) else None


def _of_gmem(error: int) -> Handler:
    """A call that a guest_memfd refuses in one way; on our other files it is the socket's."""

    def refuse(tracee: Tracee, call: SystemCall) -> Work:
        return -error if isinstance(file_at(tracee, call.arguments[0]), GmemFile) else None

    return refuse


TABLE: dict[Nr, Handler] = {
    Nr.FALLOCATE: _fallocate,
    **dict.fromkeys((Nr.READ, Nr.WRITE, Nr.READV, Nr.WRITEV), _stream),
    **dict.fromkeys((Nr.PREAD64, Nr.PWRITE64, Nr.PREADV, Nr.PWRITEV, Nr.PREADV2, Nr.PWRITEV2), _at_offset),
    Nr.LSEEK: _seek,
    Nr.SENDFILE: _sendfile,
    Nr.SPLICE: _splice,
    Nr.COPY_FILE_RANGE: _copy_range,
    **dict.fromkeys((Nr.FTRUNCATE, Nr.FSYNC, Nr.FDATASYNC, Nr.READAHEAD), _of_gmem(errno.EINVAL)),
    **dict.fromkeys((Nr.FCHMOD, Nr.FCHOWN, Nr.UTIMENSAT), _of_gmem(errno.EINVAL)),
    **dict.fromkeys((Nr.FSETXATTR, Nr.FGETXATTR, Nr.FREMOVEXATTR), _of_gmem(errno.EOPNOTSUPP)),
    Nr.FLISTXATTR: _of_gmem(0),
    Nr.NAME_TO_HANDLE_AT: _of_gmem(errno.EOPNOTSUPP),
}
