"""ioctls of /dev/iommu as a client makes them: a number and a user address. Copies in, calls, copies out.

All of them have one shape: a structure that begins with its own size. Errnos mean the same throughout, as iommufd.h
says: EINVAL for a structure that is too short, E2BIG for one with more than we know, EOPNOTSUPP for a flag that we do
not know, ENOENT for what is not there, EOVERFLOW for arithmetic.

Source: drivers/iommu/iommufd/main.c iommufd_fops_ioctl, ioas.c, hw_pagetable.c.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from guestmem.iommu.areas import PinnedPages
from guestmem.iommu.ioas import Ioas, PinnedSlice, Protection, Slice
from guestmem.iommu.iommufd import BoundDevice, Hwpt, IoasObject, Iommufd, Numbered
from guestmem.iommu.iova_space import U64_MAX, IovaRange
from guestmem.iommu.leaves import PinnedPage
from guestmem.iommu.script import PinningMemory, gmem_slice, pin_host_memory
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access, File
from guestmem.trace import Refusal
from guestmem.uapi import iommufd as uapi
from guestmem.uapi.iommufd import IommuArgument

A = TypeVar("A", bound=IommuArgument)
_MAP_FLAGS = uapi.IOMMU_IOAS_MAP_FIXED_IOVA | uapi.IOMMU_IOAS_MAP_WRITEABLE | uapi.IOMMU_IOAS_MAP_READABLE
_MAX_RANGES = 1 << 16
_RANGE = struct.Struct("<QQ")


class MemoryFile(Protocol):
    """A memfd of the caller. `size` in bytes."""

    @property
    def size(self) -> int: ...

    async def pin_page(self, page: int, write: bool) -> PinnedPage:
        """Raises: Refusal EFAULT `user.page`."""
        ...


class CallerMemory(PinningMemory, Protocol):
    """The memory of the process that makes the call."""

    async def copy_from_user(self, hva: int, size: int) -> bytes:
        """Raises: Refusal EFAULT `user.copy`."""
        ...

    async def copy_to_user(self, hva: int, data: bytes) -> None:
        """Raises: Refusal EFAULT `user.copy`."""
        ...


class Caller(Protocol):
    """The process that makes the call."""

    @property
    def mm(self) -> CallerMemory: ...

    async def memory_file(self, fd: int) -> File | MemoryFile:
        """A guest_memfd, if this kernel takes one here, or a memfd.

        Raises: Refusal EBADF `fd.not_open`; EINVAL `iommu.not_file`.
        """
        ...


class _Call(NamedTuple):
    """One ioctl on its way."""

    caller: Caller
    iommufd: Iommufd
    argument: int

    async def answer(self, at: int, layout: str, value: int) -> None:
        """Write one word of the structure back."""
        await self.caller.mm.copy_to_user(self.argument + at, struct.pack(layout, value))


async def ioctl(caller: Caller, iommufd: Iommufd, request: int, argument: int) -> int:
    """ioctl(2) on /dev/iommu. Raises: Refusal ENOTTY `ioctl.unknown`; EFAULT `user.copy`; what the call refuses."""
    entry = _TABLE.get(request)
    if entry is None:
        raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="/dev/iommu")
    kind, handler = entry
    what = await _copy_struct(caller.mm, argument, kind)
    await handler(_Call(caller, iommufd, argument), what)
    return 0


async def _copy_struct(mm: CallerMemory, argument: int, kind: type[A]) -> A:
    """Source: iommufd_fops_ioctl and copy_struct_from_user."""
    (size,) = struct.unpack("<I", await mm.copy_from_user(argument, 4))
    if size < kind.MIN_SIZE:
        raise Refusal(errno.EINVAL, "iommufd.size", size=size, least=kind.MIN_SIZE)
    if size > PAGE_SIZE:
        raise Refusal(errno.E2BIG, "iommufd.too_big", size=size, known=kind.SIZE)
    data = await mm.copy_from_user(argument, size)
    if any(data[kind.SIZE :]):
        raise Refusal(errno.E2BIG, "iommufd.too_big", size=size, known=kind.SIZE)
    return kind.unpack(data[: kind.SIZE].ljust(kind.SIZE, b"\0"))


def _check_supported(flags: int, supported: int = 0, *reserved: int) -> None:
    if flags & ~supported or any(reserved):
        raise Refusal(errno.EOPNOTSUPP, "iommufd.unsupported", flags=flags, supported=supported)


def _check_range(iova: int, length: int) -> None:
    if iova >= U64_MAX or length >= U64_MAX:
        raise Refusal(errno.EOVERFLOW, "iommu.overflow", iova=iova, length=length)


def _protection(flags: int) -> Protection:
    protection = Protection(bool(flags & uapi.IOMMU_IOAS_MAP_READABLE), bool(flags & uapi.IOMMU_IOAS_MAP_WRITEABLE))
    if not any(protection):
        raise Refusal(errno.EINVAL, "iommufd.argument", flags=flags)
    return protection


# Objects


async def _destroy(call: _Call, what: uapi.Destroy) -> None:
    await call.iommufd.destroy(what.id)


async def _ioas_alloc(call: _Call, what: uapi.IoasAlloc) -> None:
    _check_supported(what.flags)
    await _answer_new(call, 8, call.iommufd.alloc_ioas())


async def _hwpt_alloc(call: _Call, what: uapi.HwptAlloc) -> None:
    """Ours are page tables of an address space, of either kind; no nesting, dirty tracking or fault queue."""
    _check_supported(0, 0, what.reserved_word)
    if what.data_type or what.data_len:
        raise Refusal(errno.EINVAL, "iommufd.argument", data_type=what.data_type, data_len=what.data_len)
    call.iommufd.find(what.dev_id, BoundDevice)
    parent = call.iommufd.objects.get(what.pt_id)
    if isinstance(parent, Hwpt):
        raise Refusal(errno.EOPNOTSUPP, "iommufd.unsupported", nested_on=what.pt_id)
    if not isinstance(parent, IoasObject):
        raise Refusal(errno.EINVAL, "iommufd.not_a_pt", id=what.pt_id)
    _check_supported(what.flags, uapi.GUESTMEM_HWPT_ALLOC_TRUSTED)
    trusted = what.flags & uapi.GUESTMEM_HWPT_ALLOC_TRUSTED
    hwpt = await call.iommufd.alloc_hwpt(parent, Access.PRIVATE if trusted else Access.SHARED)
    await _answer_new(call, 16, hwpt)


async def _answer_new(call: _Call, at: int, new: Numbered) -> None:
    """The number of a new object; one that its maker does not learn of is destroyed again."""
    try:
        await call.answer(at, "<I", new.id)
    except Refusal:
        await call.iommufd.destroy(new.id)
        raise


# IOVAs


async def _iova_ranges(call: _Call, what: uapi.IoasIovaRanges) -> None:
    """What does not fit is counted all the same."""
    _check_supported(0, 0, what.reserved_word)
    ioas = _ioas(call, what.ioas_id)
    usable = list(ioas.iovas.usable())
    for number, each in enumerate(usable[: what.num_iovas]):
        await call.caller.mm.copy_to_user(what.allowed_iovas + number * _RANGE.size, _RANGE.pack(*each))
    await call.answer(8, "<I", len(usable))
    await call.answer(24, "<Q", PAGE_SIZE)
    if len(usable) > what.num_iovas:
        raise Refusal(errno.EMSGSIZE, "iommufd.ranges", room=what.num_iovas, ranges=len(usable))


async def _allow_iovas(call: _Call, what: uapi.IoasAllowIovas) -> None:
    _check_supported(0, 0, what.reserved_word)
    ioas = _ioas(call, what.ioas_id)
    if what.num_iovas > _MAX_RANGES:
        raise Refusal(errno.ENOMEM, "iommu.nomem", ranges=what.num_iovas)
    ranges: list[IovaRange] = []
    for number in range(what.num_iovas):
        data = await call.caller.mm.copy_from_user(what.allowed_iovas + number * _RANGE.size, _RANGE.size)
        new = IovaRange(*_RANGE.unpack(data))
        if new.start >= new.last or any(new.overlaps(other) for other in ranges):
            raise Refusal(errno.EINVAL, "iommufd.argument", start=new.start, last=new.last)
        ranges.append(new)
    async with ioas.lock.exclusive:
        ioas.iovas.allow(tuple(sorted(ranges)))


# Mapping


async def _map(call: _Call, what: uapi.IoasMap) -> None:
    """Memory of the caller, pinned while a device can reach it."""
    _check_supported(what.flags, _MAP_FLAGS, what.reserved_word)
    _check_range(what.iova, what.length)
    protection = _protection(what.flags)
    ioas = _ioas(call, what.ioas_id)
    if what.user_va + what.length > U64_MAX:
        raise Refusal(errno.EOVERFLOW, "iommu.overflow", user_va=what.user_va, length=what.length)
    _check_aligned(what.user_va, what.length)
    source = pin_host_memory(call.caller.mm, what.user_va, what.length, protection.writable)
    slices: list[Slice] = [PinnedSlice(source, 0, what.length >> PAGE_SHIFT)]
    await _map_slices(call, ioas, slices, what.flags, what.iova, protection, what.user_va, iova_at=32)


async def _map_file(call: _Call, what: uapi.IoasMapFile) -> None:
    """Pages of a memfd, pinned, or of a guest_memfd, not pinned."""
    _check_supported(what.flags, _MAP_FLAGS | uapi.GUESTMEM_IOAS_MAP_FOLLOW)
    _check_range(what.iova, what.length)
    protection = _protection(what.flags)
    ioas = _ioas(call, what.ioas_id)
    file = await call.caller.memory_file(what.fd)
    follow = bool(what.flags & uapi.GUESTMEM_IOAS_MAP_FOLLOW)
    slices: list[Slice]
    if isinstance(file, File):
        slices = [gmem_slice(file, what.start, what.length, follow)]
    else:
        _check_supported(what.flags, _MAP_FLAGS)
        _check_aligned(what.start, what.length)
        if what.start + what.length > file.size:
            raise Refusal(errno.EINVAL, "iommu.past_end", start=what.start, length=what.length, file_size=file.size)
        source = PinnedPages(file.pin_page, file.size >> PAGE_SHIFT, protection.writable)
        slices = [PinnedSlice(source, what.start >> PAGE_SHIFT, what.length >> PAGE_SHIFT)]
    await _map_slices(call, ioas, slices, what.flags, what.iova, protection, what.start, iova_at=32)


async def _copy(call: _Call, what: uapi.IoasCopy) -> None:
    _check_supported(what.flags, _MAP_FLAGS)
    _check_range(what.src_iova, what.length)
    _check_range(what.dst_iova, what.length)
    protection = _protection(what.flags)
    source = _ioas(call, what.src_ioas_id)
    slices = await source.slices(what.src_iova, what.length)
    ioas = _ioas(call, what.dst_ioas_id)
    await _map_slices(call, ioas, slices, what.flags, what.dst_iova, protection, what.src_iova, iova_at=24)


async def _map_slices(
    call: _Call,
    ioas: Ioas,
    slices: list[Slice],
    flags: int,
    iova: int,
    protection: Protection,
    start: int,
    iova_at: int,
) -> None:
    fixed = flags & uapi.IOMMU_IOAS_MAP_FIXED_IOVA
    mapped = await ioas.map(slices, iova if fixed else None, protection, start)
    await call.answer(iova_at, "<Q", mapped)


async def _unmap(call: _Call, what: uapi.IoasUnmap) -> None:
    ioas = _ioas(call, what.ioas_id)
    if what.iova == 0 and what.length == U64_MAX:
        unmapped = await ioas.unmap_all()
    else:
        _check_range(what.iova, what.length)
        if what.iova + what.length - 1 > U64_MAX:
            raise Refusal(errno.EOVERFLOW, "iommu.overflow", iova=what.iova, length=what.length)
        _check_aligned(what.iova, what.length)
        unmapped = await ioas.unmap(what.iova, what.length)
    await call.answer(16, "<Q", unmapped)


def _check_aligned(start: int, length: int) -> None:
    if not length or (start | length) & (PAGE_SIZE - 1):
        raise Refusal(errno.EINVAL, "iommu.unaligned", start=start, length=length)


def _ioas(call: _Call, number: int) -> Ioas:
    return call.iommufd.find(number, IoasObject).ioas


# Options


async def _option(call: _Call, what: uapi.Option) -> None:
    _check_supported(0, 0, what.reserved_word)
    if what.op not in (uapi.IOMMU_OPTION_OP_SET, uapi.IOMMU_OPTION_OP_GET):
        raise Refusal(errno.EOPNOTSUPP, "iommufd.unsupported", op=what.op)
    is_set = what.op == uapi.IOMMU_OPTION_OP_SET
    if what.option_id == uapi.IOMMU_OPTION_RLIMIT_MODE:
        value = _rlimit_mode(call.iommufd, what, is_set)
    elif what.option_id == uapi.IOMMU_OPTION_HUGE_PAGES:
        value = _huge_pages(_ioas(call, what.object_id), what.val64, is_set)
    else:
        raise Refusal(errno.EOPNOTSUPP, "iommufd.unsupported", option=what.option_id)
    await call.answer(16, "<Q", value)


def _rlimit_mode(iommufd: Iommufd, what: uapi.Option, is_set: bool) -> int:
    """Kept and told, without effect: nobody's memory is limited here."""
    if what.object_id:
        raise Refusal(errno.EOPNOTSUPP, "iommufd.unsupported", object=what.object_id)
    if is_set:
        if iommufd.objects:
            raise Refusal(errno.EBUSY, "iommufd.in_use", objects=len(iommufd.objects))
        _check_boolean(what.val64)
        iommufd.account_mode = what.val64
    return iommufd.account_mode


def _huge_pages(ioas: Ioas, value: int, is_set: bool) -> int:
    if is_set:
        _check_boolean(value)
        if not value and ioas.domains:
            raise Refusal(errno.EINVAL, "iommufd.argument", domains=len(ioas.domains))
        ioas.large_pages = bool(value)
    return int(ioas.large_pages)


def _check_boolean(value: int) -> None:
    if value > 1:
        raise Refusal(errno.EINVAL, "iommufd.argument", value=value)


_TABLE: dict[int, tuple[type[Any], Callable[[_Call, Any], Awaitable[None]]]] = {
    uapi.IOMMU_DESTROY: (uapi.Destroy, _destroy),
    uapi.IOMMU_IOAS_ALLOC: (uapi.IoasAlloc, _ioas_alloc),
    uapi.IOMMU_IOAS_ALLOW_IOVAS: (uapi.IoasAllowIovas, _allow_iovas),
    uapi.IOMMU_IOAS_COPY: (uapi.IoasCopy, _copy),
    uapi.IOMMU_IOAS_IOVA_RANGES: (uapi.IoasIovaRanges, _iova_ranges),
    uapi.IOMMU_IOAS_MAP: (uapi.IoasMap, _map),
    uapi.IOMMU_IOAS_MAP_FILE: (uapi.IoasMapFile, _map_file),
    uapi.IOMMU_IOAS_UNMAP: (uapi.IoasUnmap, _unmap),
    uapi.IOMMU_OPTION: (uapi.Option, _option),
    uapi.IOMMU_HWPT_ALLOC: (uapi.HwptAlloc, _hwpt_alloc),
}
