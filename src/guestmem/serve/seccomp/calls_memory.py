"""Mappings: of our files, and over ranges that the server must hear about before they change."""

from __future__ import annotations

import errno
import os

from guestmem.serve.files import GmemFile, VcpuFile
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.descriptors import as_int, file_at
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import NATIVE, Result, Tracee, Work
from guestmem.serve.wire import Op

_PAGE = 4096
_PROT_EXEC = 4
_MAP_TYPE, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x0F, 0x02, 0x10, 0x20
_MAP_LOCKED, _MAP_POPULATE, _MAP_HUGETLB, _MAP_NOREPLACE = 0x2000, 0x8000, 0x40000, 0x100000
_MADV_DONTNEED, _MADV_FREE, _MADV_REMOVE, _MADV_HUGEPAGE, _MADV_COLLAPSE = 4, 8, 9, 14, 25
_MADV_DONTNEED_LOCKED, _MADV_POPULATE_READ = 24, 22
_MS_SYNC = 4
_MAX_ERRNO = 4095


async def leave(tracee: Tracee, address: int, length: int) -> None:
    """What is mapped there now is about to go."""
    if length and not address % _PAGE and tracee.process.areas_touch(address, length):
        await tracee.request(Op.UNMAP, a=address, b=length)


# mmap


def _mmap(tracee: Tracee, call: SystemCall) -> Work:
    address, length, _, flags, fd, _ = call.arguments
    replaces = bool(flags & _MAP_FIXED) and not address % _PAGE and tracee.process.areas_touch(address, length)
    file = None if flags & _MAP_ANONYMOUS else file_at(tracee, fd)
    if isinstance(file, GmemFile):
        return _map_gmem(tracee, file, call)
    if isinstance(file, VcpuFile):
        return _map_vcpu(tracee, file, call)
    return _map_over(tracee, address, length) if replaces else None


async def _map_over(tracee: Tracee, address: int, length: int) -> Result:
    await leave(tracee, address, length)
    return NATIVE


async def _map_vcpu(tracee: Tracee, file: VcpuFile, call: SystemCall) -> Result:
    address, length, protection, flags, _, offset = call.arguments
    if flags & _MAP_FIXED:
        await leave(tracee, address, length)
    number = await tracee.install(os.dup(file.run.fd), cloexec=True)
    if number < 0:
        return number
    async with tracee.held():
        mapped = await tracee.inject(Nr.MMAP, address, length, protection, flags, number, offset)
        await tracee.inject(Nr.CLOSE, number)
    return mapped


async def _map_gmem(tracee: Tracee, file: GmemFile, call: SystemCall) -> Result:
    address, length, protection, flags, _, offset = call.arguments
    if offset % _PAGE or not length or flags & _MAP_HUGETLB or (flags & _MAP_FIXED and address % _PAGE):
        return -errno.EINVAL
    if flags & _MAP_FIXED and not flags & _MAP_NOREPLACE:
        await leave(tracee, address, length)
    reply = await tracee.request(Op.MMAP_CHECK, file, length, protection, flags, offset)
    if reply.error:
        return -reply.error
    async with tracee.held():
        await tracee.process.prepare_guard(tracee)
        mapped = await _map_closed(tracee, file, call)
        # As in the kernel, a page that cannot be had is no error here.
        if mapped >= 0 and flags & _MAP_LOCKED:
            await tracee.inject(Nr.MLOCK, mapped, length)
        elif mapped >= 0 and flags & _MAP_POPULATE:
            await tracee.inject(Nr.MADVISE, mapped, length, _MADV_POPULATE_READ)
    return mapped


async def _map_closed(tracee: Tracee, file: GmemFile, call: SystemCall) -> int:
    """Nobody can touch it until the server has guarded what is private."""
    address, length, protection, flags, fd, offset = call.arguments
    closed = flags & ~(_MAP_POPULATE | _MAP_LOCKED)
    mapped = await tracee.inject(Nr.MMAP, address, length, 0, closed, fd, offset)
    if -_MAX_ERRNO <= mapped < 0:
        return mapped
    reply = await tracee.request(Op.MMAP_DONE, file, mapped, length, offset, protection)
    error = reply.error or -await tracee.inject(Nr.MPROTECT, mapped, length, protection)
    if not error:
        return mapped
    await leave(tracee, mapped, length)
    await tracee.inject(Nr.MUNMAP, mapped, length)
    return -error


# munmap, mprotect


def _munmap(tracee: Tracee, call: SystemCall) -> Work:
    address, length = call.arguments[:2]
    if address % _PAGE or not length or not tracee.process.areas_touch(address, length):
        return None
    return _unmap(tracee, address, length)


async def _unmap(tracee: Tracee, address: int, length: int) -> Result:
    """A mapping may be what kept a closed file: its release has happened when the call returns."""
    gmem = tracee.process.areas_touch(address, length, gmem=True)
    await leave(tracee, address, length)
    if not gmem:
        return NATIVE
    return await tracee.close_by(Nr.MUNMAP, address, length)


def _mprotect(tracee: Tracee, call: SystemCall) -> Work:
    address, length, protection = call.arguments[:3]
    return _protect(tracee, address, length, protection) if tracee.process.areas_touch(address, length) else None


async def _protect(tracee: Tracee, address: int, length: int, protection: int) -> Result:
    if protection & _PROT_EXEC and tracee.process.areas_touch(address, length, gmem=True):
        return -errno.EACCES
    if not address % _PAGE and length:
        await tracee.request(Op.PROTECT, a=address, b=length, c=protection)
    return NATIVE


# madvise, msync


def _madvise(tracee: Tracee, call: SystemCall) -> Work:
    address, length, advice = call.arguments[0], call.arguments[1], as_int(call.arguments[2])
    if address % _PAGE or not length or not tracee.process.areas_touch(address, length):
        return None
    if tracee.process.areas_touch(address, length, gmem=True):
        return _advise_gmem(tracee, address, length, advice)
    return _advise_watched(tracee, address, length, advice)


async def _advise_gmem(tracee: Tracee, address: int, length: int, advice: int) -> Result:
    if advice == _MADV_REMOVE:
        return -(await tracee.request(Op.REMOVE, a=address, b=length)).error
    if advice == _MADV_COLLAPSE:
        return -errno.EINVAL
    # guest_memfd takes no such advice as HUGEPAGE, and the memory behind ours would
    return 0 if advice == _MADV_HUGEPAGE else NATIVE


async def _advise_watched(tracee: Tracee, address: int, length: int, advice: int) -> Result:
    """The client's memory was private; what the server put in its place is shared, so pages do not go by themselves."""
    if advice in (_MADV_DONTNEED, _MADV_DONTNEED_LOCKED, _MADV_REMOVE, _MADV_FREE):
        reply = await tracee.request(Op.DISCARD, a=address, b=length)
        if advice == _MADV_FREE:
            return -reply.error
    return NATIVE


def _msync(tracee: Tracee, call: SystemCall) -> Work:
    """There is nothing to write to."""
    address, length, flags = call.arguments[:3]
    return -errno.EINVAL if flags & _MS_SYNC and tracee.process.areas_touch(address, length, gmem=True) else None


TABLE = {
    Nr.MMAP: _mmap,
    Nr.MUNMAP: _munmap,
    Nr.MPROTECT: _mprotect,
    Nr.PKEY_MPROTECT: _mprotect,
    Nr.MADVISE: _madvise,
    Nr.MSYNC: _msync,
}
