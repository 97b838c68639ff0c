"""ioctls of a VFIO device (/dev/vfio/devices/vfioN): bind to an iommufd, attach to a page table, detach; ring the
doorbell.

The sequence is VFIO's: open, BIND_IOMMUFD, ATTACH_IOMMUFD_PT, ..., DETACH_IOMMUFD_PT, close. Before it is bound a
device does nothing. Our devices have no regions and no interrupts: what would be a write to a doorbell register is an
ioctl of our own, which returns when the work is done.

Source: drivers/vfio/device_cdev.c vfio_df_ioctl_bind_iommufd, vfio_df_ioctl_attach_pt, vfio_df_ioctl_detach_pt.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from guestmem.iommu.device import DmaDevice, DmaFault
from guestmem.iommu.engine import DmaEngine
from guestmem.iommu.ioctl import CallerMemory
from guestmem.iommu.iommufd import BoundDevice, Iommufd
from guestmem.trace import Refusal
from guestmem.uapi import iommufd as uapi
from guestmem.uapi.structs import Argument

A = TypeVar("A", bound=Argument)
MAX_DESCRIPTORS = 1 << 16
"""Entries of a ring, and what one doorbell may ask for."""


class VfioCaller(Protocol):
    """The process that makes the call."""

    @property
    def mm(self) -> CallerMemory: ...

    async def iommufd(self, fd: int) -> Iommufd | None:
        """An open /dev/iommu; None for another file. Raises: Refusal EBADF `fd.not_open`."""
        ...


class Engine(Protocol):
    """What works on descriptors: in this process, or in one of its own."""

    async def doorbell(self, ring: int, entries: int, first: int, count: int) -> int:
        """See DmaEngine. Raises: Refusal EIO `vfio.dead`."""
        ...


class VfioDevice:
    """One open device file."""

    def __init__(self, device: DmaDevice, engine: Engine | None = None) -> None:
        self.device = device
        self.engine: Engine = engine or DmaEngine(device, DmaFault, device.give_way)
        self.bound: BoundDevice | None = None

    async def ioctl(self, caller: VfioCaller, request: int, argument: int) -> int:
        """ioctl(2). Raises: Refusal EINVAL `vfio.not_bound`; ENOTTY `ioctl.unknown`; what the call refuses."""
        if request == uapi.VFIO_DEVICE_BIND_IOMMUFD:
            return await self._bind(caller, argument)
        if self.bound is None:
            raise Refusal(errno.EINVAL, "vfio.not_bound", device=self.device.number)
        handler = _TABLE.get(request)
        if handler is None:
            raise Refusal(errno.ENOTTY, "ioctl.unknown", request=request, on="VFIO device")
        return await handler(self, caller.mm, self.bound, argument)

    async def release(self) -> None:
        """The last descriptor is gone: detached and unbound."""
        if self.bound is not None:
            await self.bound.put()
            self.bound = None

    async def _bind(self, caller: VfioCaller, argument: int) -> int:
        bind = await _copy(caller.mm, argument, uapi.VfioBindIommufd)
        if bind.argsz < bind.SIZE or bind.flags or bind.iommufd < 0:
            raise Refusal(errno.EINVAL, "vfio.argument", argsz=bind.argsz, flags=bind.flags, iommufd=bind.iommufd)
        iommufd = await caller.iommufd(bind.iommufd)
        if self.bound is not None:
            raise Refusal(errno.EINVAL, "vfio.bound", device=self.device.number)
        if iommufd is None:
            raise Refusal(errno.EBADFD, "vfio.not_iommufd", fd=bind.iommufd)
        self.bound = iommufd.bind(self.device)
        try:
            await caller.mm.copy_to_user(argument + 12, struct.pack("<I", self.bound.id))
        except Refusal:
            await self.release()
            raise
        return 0

    async def _attach(self, mm: CallerMemory, bound: BoundDevice, argument: int) -> int:
        attach = await _copy(mm, argument, uapi.VfioAttachPt)
        _check(attach.argsz, attach.SIZE, attach.flags)
        number = await bound.iommufd.attach(bound, attach.pt_id)
        try:
            await mm.copy_to_user(argument + 8, struct.pack("<I", number))
        except Refusal:
            await bound.iommufd.detach(bound)
            raise
        return 0

    async def _detach(self, mm: CallerMemory, bound: BoundDevice, argument: int) -> int:
        detach = await _copy(mm, argument, uapi.VfioDetachPt)
        _check(detach.argsz, detach.SIZE, detach.flags)
        await bound.iommufd.detach(bound)
        return 0

    async def _get_info(self, mm: CallerMemory, bound: BoundDevice, argument: int) -> int:
        info = await _copy(mm, argument, uapi.VfioDeviceInfo)
        _check(info.argsz, info.SIZE, 0)
        await mm.copy_to_user(argument, uapi.VfioDeviceInfo(info.SIZE, uapi.VFIO_DEVICE_FLAGS_RESET).pack())
        return 0

    async def _reset(self, mm: CallerMemory, bound: BoundDevice, argument: int) -> int:
        """Between two doorbells there is nothing that a reset could stop."""
        return 0

    async def _doorbell(self, mm: CallerMemory, bound: BoundDevice, argument: int) -> int:
        bell = await _copy(mm, argument, uapi.DmaDoorbell)
        _check(bell.argsz, bell.SIZE, bell.flags)
        if not 0 < bell.entries <= MAX_DESCRIPTORS or bell.first >= bell.entries or bell.count > MAX_DESCRIPTORS:
            raise Refusal(errno.EINVAL, "vfio.argument", entries=bell.entries, first=bell.first, count=bell.count)
        done = await self.engine.doorbell(bell.ring, bell.entries, bell.first, bell.count)
        await mm.copy_to_user(argument + 28, struct.pack("<I", done))
        return 0


async def _copy(mm: CallerMemory, argument: int, kind: type[A]) -> A:
    return kind.unpack(await mm.copy_from_user(argument, kind.SIZE))


def _check(argsz: int, least: int, flags: int) -> None:
    if argsz < least or flags:
        raise Refusal(errno.EINVAL, "vfio.argument", argsz=argsz, flags=flags)


_Handler = Callable[[VfioDevice, CallerMemory, BoundDevice, int], Awaitable[int]]
_TABLE: dict[int, _Handler] = {
    uapi.VFIO_DEVICE_GET_INFO: VfioDevice._get_info,
    uapi.VFIO_DEVICE_RESET: VfioDevice._reset,
    uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT: VfioDevice._attach,
    uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT: VfioDevice._detach,
    uapi.GUESTMEM_DMA_DOORBELL: VfioDevice._doorbell,
}
