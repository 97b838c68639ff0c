"""Dma: a device behind an IOMMU, as scenarios set it up, and what it then does as an actor.

    dma = Dma(m)
    dma.map(gmem)
    m.actor("device", dma.write(b"d"), dma.read())

The first page is at IOVA `BASE`. A DMA that faults is answered by the rule that refused it; one that would reset the
machine ends the execution, as a violation.
"""

from __future__ import annotations

from guestmem.check.invariants import Violation
from guestmem.check.machine import Call, Machine
from guestmem.host import Gmem
from guestmem.iommu import DmaFault
from guestmem.iommu.device import MACHINE_CHECK
from guestmem.iommu.ioas import PinnedSlice, Protection, Slice
from guestmem.iommu.script import DeviceHandle, IommuHandle, gmem_slice, pin_host_memory
from guestmem.memory import PAGE_SHIFT, PAGE_SIZE
from guestmem.userspace import View

BASE = 1 << 30


class Dma:
    """/dev/iommu with one address space and one device, which is attached to it. `trusted`: by a page table of T=1."""

    def __init__(self, m: Machine, *, page_requests: bool = True, trusted: bool = False, attach: bool = True) -> None:
        self.m = m
        self.iommu: IommuHandle = m.open_iommu()
        self.space = self.iommu.alloc_ioas()
        self.device = self.plug(page_requests=page_requests, trusted=trusted, attach=attach)

    def plug(self, *, page_requests: bool = True, trusted: bool = False, attach: bool = True) -> DeviceHandle:
        """Another device on the same address space."""
        device = self.iommu.bind(self.m.new_dma_device(page_requests=page_requests))
        if attach:
            device.attach(self.iommu.alloc_hwpt(self.space, trusted=True) if trusted else self.space)
        return device

    # Setting up

    def map(self, gmem: Gmem, *, follow: bool = False) -> None:
        """All of a file, at BASE."""
        self.space.map_gmem(gmem.file, 0, gmem.inode.size, iova=BASE, follow=follow)

    def pin(self, view: View, page: int = 0, pages: int = 1) -> None:
        """Host memory as today's kernels map it, at BASE."""
        self.space.map_pinned(view.hva + page * PAGE_SIZE, pages * PAGE_SIZE, iova=BASE)

    # What actors do

    def write(self, data: bytes, page: int = 0, device: DeviceHandle | None = None) -> Call:
        """DMA to memory."""

        async def write() -> str:
            try:
                await (device or self.device).device.write(BASE + page * PAGE_SIZE, data)
            except DmaFault as fault:
                if fault.refusal.rule == MACHINE_CHECK:
                    raise Violation("MC", str(fault)) from fault
                return fault.refusal.rule
            return "ok"

        return write()

    def read(self, page: int = 0, size: int = 1, device: DeviceHandle | None = None) -> Call:
        """DMA from memory. Answers what it read."""

        async def read() -> str:
            try:
                data = await (device or self.device).device.read(BASE + page * PAGE_SIZE, size)
            except DmaFault as fault:
                return fault.refusal.rule
            return f"read 0x{data.hex()}"

        return read()

    def map_file(self, gmem: Gmem, page: int = 0, pages: int = 1, follow: bool = False) -> Call:
        """IOMMU_IOAS_MAP_FILE at BASE."""
        what: list[Slice] = [gmem_slice(gmem.file, page << PAGE_SHIFT, pages << PAGE_SHIFT, follow)]
        return self.space.ioas.map(what, BASE, Protection())

    def map_memory(self, view: View, page: int = 0, pages: int = 1) -> Call:
        """IOMMU_IOAS_MAP at BASE."""
        source = pin_host_memory(self.m.process.mm, view.hva + page * PAGE_SIZE, pages * PAGE_SIZE, True)
        return self.space.ioas.map([PinnedSlice(source, 0, pages)], BASE, Protection())

    def unmap(self, page: int = 0, pages: int = 1) -> Call:
        """IOMMU_IOAS_UNMAP."""
        return self.space.ioas.unmap(BASE + page * PAGE_SIZE, pages << PAGE_SHIFT)

    def attach(self, device: DeviceHandle | None = None) -> Call:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT to the address space."""
        bound = (device or self.device).bound
        return bound.iommufd.attach(bound, self.space.object.id)

    def detach(self, device: DeviceHandle | None = None) -> Call:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT."""
        bound = (device or self.device).bound
        return bound.iommufd.detach(bound)

    def die(self, device: DeviceHandle | None = None) -> Call:
        """The process of the device ends: its descriptor is closed."""
        return self.m.process.fds.close((device or self.device).fd)
