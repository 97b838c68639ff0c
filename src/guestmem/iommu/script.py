"""The IOMMU in a script: blocking calls on what `Host.open_iommu` and `Host.new_dma_device` return.

    iommu = host.open_iommu()
    ioas = iommu.alloc_ioas()
    device = iommu.bind(host.new_dma_device())
    device.attach(ioas)
    iova = ioas.map_gmem(gmem.file, 0, 1 << 20)
    device.write(iova, b"by DMA")

Bytes everywhere. What a call refuses it raises as `Refusal`, a DMA that is not allowed as `DmaFault`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from guestmem.iommu.addresses import Iova
from guestmem.iommu.areas import PinnedPages
from guestmem.iommu.device import DmaDevice, DmaFault
from guestmem.iommu.domain import DomainStatistics
from guestmem.iommu.engine import DESCRIPTOR_SIZE, Descriptor, DmaEngine
from guestmem.iommu.ioas import GmemSlice, Ioas, PinnedSlice, Protection
from guestmem.iommu.iommufd import BoundDevice, Hwpt, IoasObject, Iommufd
from guestmem.iommu.leaves import PinnedPage
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE, Access, File, PageIndex, page_range
from guestmem.trace import Refusal

Run = Callable[..., Any]


class PinningMemory(Protocol):
    """The memory of the process that makes the call."""

    async def pin_page(self, hva: int, write: bool) -> PinnedPage:
        """Raises: Refusal EFAULT `user.page`."""
        ...


class Descriptors(Protocol):
    """The process's table of open files."""

    def reserve(self) -> int: ...

    def install(self, fd: int, file: Iommufd | BoundDevice) -> None: ...

    def close(self, fd: int) -> Coroutine[Any, Any, None]: ...


def pin_host_memory(mm: PinningMemory, hva: int, length: int, writable: bool) -> PinnedPages:
    """Page-aligned host memory as areas show it; nothing is pinned yet."""

    async def pin_one(page: int, write: bool) -> PinnedPage:
        return await mm.pin_page(hva + (page << PAGE_SHIFT), write)

    return PinnedPages(pin_one, length >> PAGE_SHIFT, writable)


def gmem_slice(file: File, start: int, length: int, follow: bool) -> GmemSlice:
    """Bytes of a guest_memfd as areas show them. Raises: Refusal EINVAL `iommu.unaligned`, `iommu.past_end`."""
    pages = page_range(start, length)
    if pages is None:
        raise Refusal(errno.EINVAL, "iommu.unaligned", start=start, length=length)
    if pages.end > file.inode.pages:
        raise Refusal(errno.EINVAL, "iommu.past_end", start=start, length=length, file_size=file.inode.size)
    return GmemSlice(file.inode, PageIndex(pages.start), pages.pages, follow)


class IommuHandle:
    """An open /dev/iommu."""

    def __init__(self, run: Run, iommufd: Iommufd, mm: PinningMemory, fds: Descriptors) -> None:
        self.iommufd = iommufd
        self.fd = fds.reserve()
        fds.install(self.fd, iommufd)
        self._run = run
        self._mm = mm
        self._fds = fds

    def alloc_ioas(self) -> IoasHandle:
        """IOMMU_IOAS_ALLOC."""
        return IoasHandle(self._run, self.iommufd.alloc_ioas(), self._mm)

    def alloc_hwpt(self, ioas: IoasHandle, *, trusted: bool = False) -> Hwpt:
        """IOMMU_HWPT_ALLOC: a page table of T=0 or T=1. Raises: Refusal `iommu.*`."""
        access = Access.PRIVATE if trusted else Access.SHARED
        hwpt: Hwpt = self._run(self.iommufd.alloc_hwpt(ioas.object, access), "alloc hwpt")
        return hwpt

    def bind(self, device: DmaDevice) -> DeviceHandle:
        """VFIO_DEVICE_BIND_IOMMUFD. Raises: Refusal `vfio.bound`."""
        return DeviceHandle(self._run, self.iommufd.bind(device), self._fds)

    def destroy(self, what: IoasHandle | Hwpt) -> None:
        """IOMMU_DESTROY. Raises: Refusal `iommufd.in_use`, `iommufd.no_object`."""
        self._run(self.iommufd.destroy(what.object.id if isinstance(what, IoasHandle) else what.id), "destroy")

    def close(self) -> None:
        """Close the descriptor. Bound devices keep the file."""
        self._run(self._fds.close(self.fd), "close")


class IoasHandle:
    """An IO address space."""

    def __init__(self, run: Run, made: IoasObject, mm: PinningMemory) -> None:
        self.object = made
        self._run = run
        self._mm = mm

    @property
    def ioas(self) -> Ioas:
        return self.object.ioas

    def map_gmem(
        self,
        file: File,
        start: int,
        length: int,
        *,
        iova: int | None = None,
        follow: bool = False,
        readable: bool = True,
        writable: bool = True,
    ) -> Iova:
        """IOMMU_IOAS_MAP_FILE of a guest_memfd: nothing is pinned. Raises: Refusal `iommu.*`, `fault.poisoned`,
        ENOMEM."""
        what = gmem_slice(file, start, length, follow)
        return self._map([what], iova, Protection(readable, writable), start)

    def map_pinned(self, hva: int, length: int, *, iova: int | None = None, writable: bool = True) -> Iova:
        """IOMMU_IOAS_MAP of host memory, which is pinned while a device can reach it. Raises: Refusal `user.page`."""
        if hva % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
            raise Refusal(errno.EINVAL, "iommu.unaligned", hva=hva, length=length)
        source = pin_host_memory(self._mm, hva, length, writable)
        return self._map([PinnedSlice(source, 0, length >> PAGE_SHIFT)], iova, Protection(True, writable), hva)

    def copy_to(self, other: IoasHandle, iova: int, length: int, *, to: int | None = None) -> Iova:
        """IOMMU_IOAS_COPY. Raises: Refusal `iommu.*`."""
        slices = self._run(self.ioas.slices(iova, length), "copy")
        return other._map(slices, to, Protection(), iova)

    def unmap(self, iova: int, length: int) -> int:
        """IOMMU_IOAS_UNMAP; how many bytes were mapped. Raises: Refusal `iommu.part`, `iommu.not_mapped`."""
        unmapped: int = self._run(self.ioas.unmap(iova, length), "unmap")
        return unmapped

    def statistics(self) -> list[DomainStatistics]:
        """Of each of its page tables."""
        return [domain.statistics() for domain in self.ioas.domains]

    def _map(self, slices: list[Any], iova: int | None, protection: Protection, start: int) -> Iova:
        mapped: Iova = self._run(self.ioas.map(slices, iova, protection, start), "map")
        return mapped


class DeviceHandle:
    """The open file of a device that is bound to an iommufd, and the device's engine."""

    def __init__(self, run: Run, bound: BoundDevice, fds: Descriptors) -> None:
        self.bound = bound
        self.device = bound.device
        self.fd = fds.reserve()
        fds.install(self.fd, bound)
        self._run = run
        self._fds = fds

    def attach(self, to: IoasHandle | Hwpt) -> None:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT. Raises: Refusal `iommu.*`."""
        number = to.object.id if isinstance(to, IoasHandle) else to.id
        self._run(self.bound.iommufd.attach(self.bound, number), "attach")

    def detach(self) -> None:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT."""
        self._run(self.bound.iommufd.detach(self.bound), "detach")

    def close(self) -> None:
        """Close the descriptor: the device is detached and unbound."""
        self._run(self._fds.close(self.fd), "close")

    def read(self, iova: int, size: int) -> bytes:
        """DMA from memory. Raises: DmaFault."""
        data: bytes = self._run(self.device.read(iova, size), "DMA read")
        return data

    def write(self, iova: int, data: bytes) -> None:
        """DMA to memory. Raises: DmaFault."""
        self._run(self.device.write(iova, data), "DMA write")

    def submit(self, ring: int, *descriptors: Descriptor) -> list[Descriptor]:
        """Put descriptors into a ring of their number at IOVA `ring`, by DMA, ring the doorbell, and read them back.

        Raises: DmaFault if the ring cannot be reached.
        """
        self.write(ring, b"".join(each.pack() for each in descriptors))
        engine = DmaEngine(self.device, DmaFault)
        self._run(engine.doorbell(ring, len(descriptors), 0, len(descriptors)), "doorbell")
        data = self.read(ring, len(descriptors) * DESCRIPTOR_SIZE)
        return [Descriptor.unpack(data[at : at + DESCRIPTOR_SIZE]) for at in range(0, len(data), DESCRIPTOR_SIZE)]
