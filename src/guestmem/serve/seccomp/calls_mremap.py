"""mremap(). A mapping of a guest_memfd never leaves its place before the server knows: the place could be given to
another thread's mapping in between. So a move is a second mapping of the same pages, a word to the server, a munmap.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from guestmem.serve.proc_maps import find_vma
from guestmem.serve.seccomp.bpf import SystemCall
from guestmem.serve.seccomp.calls_memory import leave
from guestmem.serve.seccomp.descriptors import as_int
from guestmem.serve.seccomp.numbers import Nr
from guestmem.serve.seccomp.tracee import NATIVE, Result, Tracee, Work
from guestmem.serve.wire import Op

_PAGE = 4096
_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4


class _Remap(NamedTuple):
    """The arguments; lengths are whole pages."""

    address: int
    length: int
    new_length: int
    flags: int
    new_address: int

    @property
    def overlaps(self) -> bool:
        over = self.new_address < self.address + self.length and self.address < self.new_address + self.new_length
        return bool(self.flags & _FIXED) and over


def _mremap(tracee: Tracee, call: SystemCall) -> Work:
    address, length, new_length, flags, new_address = call.arguments[:5]
    remap = _Remap(address, -(-length // _PAGE) * _PAGE, -(-new_length // _PAGE) * _PAGE, as_int(flags), new_address)
    touch = tracee.process.areas_touch
    over = bool(flags & _FIXED) and not new_address % _PAGE and not remap.overlaps and touch(new_address, new_length)
    gmem = touch(address, remap.length, gmem=True)
    return _remap(tracee, remap, over, gmem) if over or gmem or touch(address, remap.length) else None


async def _remap(tracee: Tracee, remap: _Remap, over: bool, gmem: bool) -> Result:
    if over:
        await leave(tracee, remap.new_address, remap.new_length)
    if not gmem:
        await leave(tracee, remap.address, remap.length)
        return NATIVE
    may_move = bool(remap.flags & _MAYMOVE)
    unknown = remap.flags & ~(_MAYMOVE | _FIXED | _DONTUNMAP)
    if remap.address % _PAGE or not remap.new_length or unknown or (remap.flags and not may_move):
        return NATIVE  # an error, and the kernel knows which
    if remap.length and not remap.flags & (_DONTUNMAP | _FIXED) and remap.new_length <= remap.length:
        return await _shrink(tracee, remap)
    async with tracee.held():
        if remap.flags & _DONTUNMAP:
            return await _keep_both(tracee, remap)
        if not remap.length or remap.flags & _FIXED:
            return await _move(tracee, remap) if may_move else -errno.EINVAL
        return await _grow(tracee, remap)


async def _shrink(tracee: Tracee, remap: _Remap) -> int:
    tail = remap.length - remap.new_length
    if tail:
        await leave(tracee, remap.address + remap.new_length, tail)
        error = await tracee.close_by(Nr.MUNMAP, remap.address + remap.new_length, tail)
        if error:
            return error
    return remap.address


async def _move(tracee: Tracee, remap: _Remap) -> int:
    if remap.overlaps:
        return -errno.EINVAL
    if not _is_one_mapping(tracee, remap):
        return -errno.EFAULT
    moved = await _do(tracee, remap._replace(length=0))
    if moved < 0:
        return moved
    if remap.length:  # the guard goes before the mapping does
        await tracee.inject(Nr.MPROTECT, remap.address, remap.length, 0)
    await _tell(tracee, remap, moved, remap.length)
    if remap.length:
        await tracee.inject(Nr.MUNMAP, remap.address, remap.length)
    return moved


async def _grow(tracee: Tracee, remap: _Remap) -> int:
    grown = await _do(tracee, remap._replace(flags=0, new_address=0))
    if grown >= 0:
        await _tell(tracee, remap, grown, remap.length)
        return grown
    return await _move(tracee, remap) if remap.flags & _MAYMOVE else grown


async def _keep_both(tracee: Tracee, remap: _Remap) -> int:
    moved = await _do(tracee, remap)
    if moved >= 0:
        await _tell(tracee, remap, moved, 0)
    return moved


async def _do(tracee: Tracee, remap: _Remap) -> int:
    return await tracee.inject_as_is(Nr.MREMAP, [*remap, 0])


async def _tell(tracee: Tracee, remap: _Remap, moved: int, left: int) -> None:
    """`left`: how much of the old place is no longer this mapping's."""
    await tracee.request(Op.MOVED, a=remap.address, b=left, c=moved, d=remap.new_length)


def _is_one_mapping(tracee: Tracee, remap: _Remap) -> bool:
    """Guarded ranges are mappings of their own to the kernel, one to the client; what mprotect() has split is not."""
    at, end, permissions = remap.address, remap.address + remap.length, ""
    while at < end:
        vma = find_vma(tracee.tid, at)
        if vma is None or permissions not in ("", vma.permissions):
            return False
        at, permissions = vma.end, vma.permissions
    return True


TABLE = {Nr.MREMAP: _mremap}
