"""What a client's shim asks for besides ioctls: descriptors, mappings, fallocate. One handler for each op of the wire.

Numbers that come from a client are checked before they are used: a client that lies gets an errno.
"""

from __future__ import annotations

import errno
import os

from guestmem.cpu.library import library_path
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, PageIndex
from guestmem.memory.fallocate import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from guestmem.serve import wire
from guestmem.serve.call import Call
from guestmem.serve.dispatch import ioctl
from guestmem.serve.files import GmemFile, IommuFile, KvmDevice, ServedFile, VcpuFile
from guestmem.serve.gmem_mappings import PROT_EXEC, GmemArea
from guestmem.serve.gup_test import GupTest
from guestmem.serve.iommu_caller import open_vfio
from guestmem.serve.server import Handler
from guestmem.serve.wire import FileKind, Op
from guestmem.trace import Refusal

_MAP_TYPE, _MAP_PRIVATE, _MAP_SHARED_VALIDATE, _MAP_SYNC = 0x0F, 0x02, 0x03, 0x80000
_ADDRESS_LIMIT = 1 << 47


def _bad_request(call: Call) -> Refusal:
    return Refusal(errno.EPROTO, "wire.bad_request", op=call.request.op, file=call.request.file)


def _gmem(call: Call) -> GmemFile:
    if not isinstance(call.file, GmemFile):
        raise _bad_request(call)
    return call.file


def _range(call: Call, start: int, size: int) -> tuple[int, int]:
    end = start + -(-size // PAGE_SIZE) * PAGE_SIZE
    if start % PAGE_SIZE or not size or end > _ADDRESS_LIMIT:
        raise _bad_request(call)
    return start, end


async def _open(call: Call) -> int:
    file: ServedFile
    match call.request.a:
        case wire.OPEN_KVM:
            file = KvmDevice(None)
        case wire.OPEN_GUP_TEST:
            file = GupTest(call.client)
        case wire.OPEN_IOMMU:
            file = IommuFile(call.client, call.server.host.iommu.open())
        case wire.OPEN_LIVE_UPDATE:
            file = call.server.sessions.open_device(call.client)
        case device if wire.OPEN_VFIO <= device < wire.OPEN_VFIO + wire.VFIO_DEVICES:
            file = open_vfio(call, device - wire.OPEN_VFIO)
        case _:
            raise _bad_request(call)
    return call.give(call.server.add_token(file))


async def _identify(call: Call) -> int:
    if call.file is None:
        return FileKind.NONE
    call.a = call.file.owner.number if call.file.owner is not None else 0
    if isinstance(call.file, GmemFile):
        call.b = call.file.file.inode.size
    return call.file.kind


async def _vcpu(call: Call) -> int:
    """A vCPU is about to run in the client: what is shared of it, the number of its VM, and how it is to run."""
    if not isinstance(call.file, VcpuFile) or call.file.cpu is None:
        raise _bad_request(call)
    call.b = call.server.cpu_mode
    call.reply(os.fsencode(library_path()) + b"\0")
    call.give(os.dup(call.file.cpu.fd))
    return call.file.vcpu.kvm.number


async def _run_fd(call: Call) -> int:
    if not isinstance(call.file, VcpuFile):
        raise _bad_request(call)
    return call.give(os.dup(call.file.run.fd))


async def _mmap_check(call: Call) -> int:
    """The checks of mmap(2) that the memfd behind the file would not make. Source: golden_6_18.md rows M1 to M33."""
    gmem, request = _gmem(call), call.request
    prot, flags = request.b, request.c
    if prot & PROT_EXEC:
        raise Refusal(errno.EPERM, "mmap.exec", prot=prot)
    if not gmem.file.inode.abilities.mmap:
        raise Refusal(errno.ENODEV, "mmap.not_mappable")
    if flags & _MAP_TYPE == _MAP_PRIVATE:
        raise Refusal(errno.EINVAL, "mmap.private")
    if flags & _MAP_TYPE == _MAP_SHARED_VALIDATE and flags & _MAP_SYNC:
        raise Refusal(errno.EOPNOTSUPP, "mmap.sync", flags=flags)
    return 0


async def _mmap_done(call: Call) -> int:
    """The mapping exists, untouched. Guard its private ranges, in the place of whatever was there."""
    gmem, request = _gmem(call), call.request
    start, end = _range(call, request.a, request.b)
    if request.c % PAGE_SIZE:
        raise _bad_request(call)
    memory = call.client.memory
    await memory.unmap(start, end)
    area = GmemArea(call.client, gmem.mappings, start, end, PageIndex(request.c >> PAGE_SHIFT), request.d)
    memory.add(area)
    await gmem.mappings.attach(area)
    return 0


async def _unmap(call: Call) -> int:
    await call.client.memory.unmap(*_range(call, call.request.a, call.request.b))
    return 0


async def _moved(call: Call) -> int:
    """mremap(2) is done. The guard does not move with the pages, so ranges are guarded anew."""
    request = call.request
    old, old_end = _range(call, request.a, request.b) if request.b else (request.a, request.a)
    new, new_end = _range(call, request.c, request.d)
    memory = call.client.memory
    source = memory.area_at(old)
    if request.b:  # of 0 bytes: the old mapping stays, and a second one of the same pages appears
        await memory.unmap(old, old_end)
    if not isinstance(source, GmemArea):
        return 0
    await memory.unmap(new, new_end)
    area = GmemArea(call.client, source.mappings, new, new_end, source.index_of(old), source.prot)
    memory.add(area)
    await source.mappings.attach(area)
    return 0


async def _protect(call: Call) -> int:
    start, end = _range(call, call.request.a, call.request.b)
    await call.client.memory.protect(start, end, call.request.c)
    return 0


async def _discard(call: Call) -> int:
    await call.client.memory.tell_kvm(*_range(call, call.request.a, call.request.b))
    return 0


async def _fallocate(call: Call) -> int:
    request = call.request
    await _gmem(call).file.inode.fallocate(_signed(request.a), _signed(request.b), _signed(request.c))
    return 0


async def _remove(call: Call) -> int:
    """MADV_REMOVE through a mapping: a hole in the file."""
    start, end = _range(call, call.request.a, call.request.b)
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    areas = [a for a in call.client.memory.areas if isinstance(a, GmemArea) and a.start < end and start < a.end]
    for area in areas:
        low, high = max(area.start, start), min(area.end, end)
        await area.inode.fallocate(mode, area.offset_of(low), high - low)
    return 0


async def _stat(call: Call) -> int:
    call.a, call.b = await _gmem(call).blocks()
    return 0


async def _sync(call: Call) -> int:
    await call.server.sync()
    return 0


async def _guard(call: Call) -> int:
    """The descriptor was taken when the request came."""
    return 0


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


HANDLERS: dict[int, Handler] = {
    Op.OPEN: _open,
    Op.IDENTIFY: _identify,
    Op.IOCTL: ioctl,
    Op.RUN_FD: _run_fd,
    Op.MMAP_CHECK: _mmap_check,
    Op.MMAP_DONE: _mmap_done,
    Op.UNMAP: _unmap,
    Op.MOVED: _moved,
    Op.PROTECT: _protect,
    Op.DISCARD: _discard,
    Op.FALLOCATE: _fallocate,
    Op.REMOVE: _remove,
    Op.SYNC: _sync,
    Op.STAT: _stat,
    Op.VCPU: _vcpu,
    Op.GUARD: _guard,
}
