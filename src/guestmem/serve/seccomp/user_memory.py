"""Memory and descriptors of another process that we trace, by process_vm_readv(2) and pidfd_getfd(2)."""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_SYS_PIDFD_GETFD = 438


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("length", ctypes.c_uint64)]


for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.POINTER(_Iovec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]


def read_memory(pid: int, address: int, size: int) -> bytes | None:
    """`size` bytes; None where the process itself would get a fault."""
    buffer = ctypes.create_string_buffer(size)
    local, remote = _Iovec(ctypes.addressof(buffer), size), _Iovec(address, size)
    done = _libc.process_vm_readv(pid, local, 1, remote, 1, 0)
    return buffer.raw if done == size else None


def write_memory(pid: int, address: int, data: bytes) -> bool:
    """False where the process itself would get a fault; a part may have been written."""
    if not data:
        return True
    buffer = ctypes.create_string_buffer(data, len(data))
    local, remote = _Iovec(ctypes.addressof(buffer), len(data)), _Iovec(address, len(data))
    return bool(_libc.process_vm_writev(pid, local, 1, remote, 1, 0) == len(data))


def read_string(pid: int, address: int, limit: int = 4096) -> bytes | None:
    """A string up to its NUL; None if it is not all there, or longer."""
    found = b""
    while len(found) < limit:
        size = min(256, 4096 - (address + len(found)) % 4096)
        part = read_memory(pid, address + len(found), size)
        if part is None:
            return None
        end = part.find(0)
        if end >= 0:
            return found + part[:end]
        found += part
    return None


def take_descriptor(pid: int, fd: int) -> int:
    """A duplicate of a process's descriptor, with close-on-exec. Raises: OSError."""
    process = os.pidfd_open(pid)
    try:
        taken = _libc.syscall(_SYS_PIDFD_GETFD, process, fd, 0)
        if taken < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(taken)
    finally:
        os.close(process)
