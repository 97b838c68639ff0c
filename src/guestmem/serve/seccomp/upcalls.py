"""What the server asks of a client, done from outside: memory is copied, descriptors are looked at and taken; for what
changes mappings a stopped thread of the client is made to call.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

from guestmem.serve.channel import UpcallResult
from guestmem.serve.proc_maps import find_vma
from guestmem.serve.seccomp.descriptors import number_of
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.user_memory import read_memory, take_descriptor, write_memory
from guestmem.serve.wire import Upcall

if TYPE_CHECKING:
    from guestmem.serve.seccomp.tracee import Tracee

NEED_A_STOP = (Upcall.ZAP, Upcall.REPLACE, Upcall.OVERLAY, Upcall.UNCOVER, Upcall.PRIVATE)

_PROT_READ, _PROT_WRITE = 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x4000
_MADV_DONTNEED, _MADV_DONTNEED_LOCKED = 4, 24
_PAIR = struct.Struct("<QQ")
_PAGE = 4096
_COPY = 1 << 20
_PRESENT = 0b11 << 62
"""Bits of a word of /proc/PID/pagemap: in memory, or swapped out."""


async def do(
    tracee: Tracee, op: Upcall, payload: bytes, a: int, b: int, c: int, d: int, fds: tuple[int, ...]
) -> UpcallResult:
    """One upcall, as docs/reference/wire.md has it. Raises: Gone."""
    match op:
        case Upcall.READ:
            data = read_memory(tracee.tid, a, b)
            return _result(errno.EFAULT) if data is None else UpcallResult(0, 0, data, [])
        case Upcall.WRITE:
            return _result(0 if write_memory(tracee.tid, a, payload) else errno.EFAULT)
        case Upcall.FD:
            return _descriptor(tracee, a, bool(b))
        case Upcall.ZAP:
            return _result(await _zap(tracee, payload))
        case Upcall.REPLACE:
            return _result(await _replace(tracee, a, b, c, fds[0]))
        case Upcall.OVERLAY:
            return _result(await _overlay(tracee, a, b))
        case Upcall.UNCOVER:
            return _result(await _map_over(tracee, a, b, c, _MAP_SHARED, fds[0], d))
        case Upcall.PRIVATE:
            return _result(await _map_over(tracee, a, b, c, _MAP_PRIVATE, fds[0], d))
        case _:
            return _result(errno.ENOSYS)  # of clients that run their vCPUs


def _result(error: int) -> UpcallResult:
    return UpcallResult(error, 0, b"", [])


def _descriptor(tracee: Tracee, number: int, take: bool) -> UpcallResult:
    try:
        status = os.stat(f"/proc/{tracee.tid}/fd/{number}")
        with open(f"/proc/{tracee.tid}/fdinfo/{number}") as info:
            flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
        file = number_of(tracee, number, status.st_ino)
        fds = [take_descriptor(tracee.tgid, number)] if take else []
    except (OSError, StopIteration):
        return _result(errno.EBADF)
    return UpcallResult(0, 0, struct.pack("<QQQ", status.st_dev, file, flags), fds)


async def _zap(tracee: Tracee, payload: bytes) -> int:
    """A range may have lost pages or all of itself since the server looked: what is not there needs no zap."""
    failed = 0
    for address, length in _PAIR.iter_unpack(payload):
        error = -await tracee.inject(Nr.MADVISE, address, length, _MADV_DONTNEED)
        if error == errno.EINVAL:  # mlocked
            error = -await tracee.inject(Nr.MADVISE, address, length, _MADV_DONTNEED_LOCKED)
        if error not in (0, errno.ENOMEM):
            failed = failed or error
    return failed


async def _overlay(tracee: Tracee, address: int, length: int) -> int:
    empty = os.memfd_create("guestmem:closed", os.MFD_CLOEXEC)
    try:
        return await _map_over(tracee, address, length, _PROT_READ | _PROT_WRITE, _MAP_SHARED, empty, 0)
    finally:
        os.close(empty)


async def _map_over(tracee: Tracee, address: int, length: int, prot: int, kind: int, fd: int, offset: int) -> int:
    """errno or 0."""
    number = await tracee.install(os.dup(fd), cloexec=True)
    if number < 0:
        return -number
    flags = kind | _MAP_FIXED | _MAP_NORESERVE
    mapped = await tracee.inject(Nr.MMAP, address, length, prot, flags, number, offset)
    await tracee.inject(Nr.CLOSE, number)
    return -mapped if mapped < 0 else 0


async def _replace(tracee: Tracee, address: int, length: int, prot: int, fd: int) -> int:
    """Private memory becomes a mapping of `fd`, its contents kept; every thread of the process is stopped meanwhile."""
    async with tracee.process.all_stopped():
        error = _copy_out(tracee, address, length, fd)
        return error or await _map_over(tracee, address, length, prot, _MAP_SHARED, fd, 0)


def _copy_out(tracee: Tracee, address: int, length: int, fd: int) -> int:
    """Write the range to a file, without the pages of anonymous memory that do not exist."""
    vma = find_vma(tracee.tid, address)
    if vma is None:
        return errno.ENOMEM
    for start in range(address, address + length, _COPY):
        size = min(_COPY, address + length - start)
        for at, count in _pages(tracee, start, size) if not vma.inode else [(start, size)]:
            data = read_memory(tracee.tid, at, count)
            if data is None:
                return errno.EFAULT
            os.pwrite(fd, data, at - address)
    return 0


def _pages(tracee: Tracee, start: int, size: int) -> list[tuple[int, int]]:
    """Address and length of the runs of pages that exist."""
    with open(f"/proc/{tracee.tid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start // _PAGE * 8)
        words = memoryview(pagemap.read(size // _PAGE * 8)).cast("Q")
    runs: list[tuple[int, int]] = []
    for number, word in enumerate(words):
        if not word & _PRESENT:
            continue
        at = start + number * _PAGE
        if runs and sum(runs[-1]) == at:
            runs[-1] = runs[-1][0], runs[-1][1] + _PAGE
        else:
            runs.append((at, _PAGE))
    return runs
