"""Iommufd: what one open /dev/iommu holds: address spaces, page tables and bound devices, by number; and the hardware.

Objects use each other: a device the page table that it is attached to, a page table its address space. What is used
cannot be destroyed. The open file is held by its descriptors and by the devices that are bound to it; when the last
goes so does everything.

Source: drivers/iommu/iommufd/main.c, device.c, hw_pagetable.c; spec/uapi.md section 16.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TypeVar

from guestmem.iommu.device import Attachment, DmaDevice
from guestmem.iommu.domain import Domain
from guestmem.iommu.ioas import Ioas, RulesOf
from guestmem.memory import Access
from guestmem.memory.pages import ORDERS
from guestmem.sched import LockClass, RefCount, Scheduler
from guestmem.trace import Refusal, Tracer
from guestmem.trace import events as event

O = TypeVar("O", bound="Numbered")  # noqa: E741


class Numbered:
    """An object of an iommufd. `users` are those of its own kind of graph, not calls under way."""

    def __init__(self) -> None:
        self.id = 0
        self.users = 0


class IoasObject(Numbered):
    """IOMMU_IOAS_ALLOC."""

    def __init__(self, ioas: Ioas) -> None:
        super().__init__()
        self.ioas = ioas


class Hwpt(Numbered):
    """A page table of an address space. `auto`: made by an attachment, and gone with the last."""

    def __init__(self, of: IoasObject, domain: Domain, auto: bool) -> None:
        super().__init__()
        self.of = of
        self.domain = domain
        self.auto = auto


class BoundDevice(Numbered):
    """A device that a driver (VFIO) has bound. The driver is a user until it unbinds: with the last `put`."""

    def __init__(self, iommufd: Iommufd, device: DmaDevice) -> None:
        super().__init__()
        self.iommufd = iommufd
        self.device = device
        self.hwpt: Hwpt | None = None
        self.users = 1
        self.references = RefCount(iommufd.iommu.scheduler, f"bound device {device.number}")

    def get(self) -> None:
        self.references.get()

    async def put(self) -> None:
        """One descriptor less; with the last the device is detached and unbound."""
        if self.references.put():
            await self.iommufd.unbind(self)


class Iommufd:
    """One open /dev/iommu."""

    def __init__(self, iommu: Iommu) -> None:
        self.iommu = iommu
        self.objects: dict[int, Numbered] = {}
        self.references = RefCount(iommu.scheduler, "iommufd")
        self.account_mode = 0  # IOMMU_OPTION_RLIMIT_MODE; nothing is accounted here

    # Objects

    def add(self, new: Numbered) -> int:
        new.id = next(number for number in range(1, len(self.objects) + 2) if number not in self.objects)
        self.objects[new.id] = new
        return new.id

    def find(self, number: int, kind: type[O]) -> O:
        """Raises: Refusal ENOENT `iommufd.no_object`."""
        found = self.objects.get(number)
        if not isinstance(found, kind):
            raise Refusal(errno.ENOENT, "iommufd.no_object", id=number, wanted=kind.__name__)
        return found

    async def destroy(self, number: int) -> None:
        """IOMMU_DESTROY. Raises: Refusal ENOENT `iommufd.no_object`; EBUSY `iommufd.in_use`."""
        found = self.find(number, Numbered)
        if found.users:
            raise Refusal(errno.EBUSY, "iommufd.in_use", id=number, users=found.users)
        await self._remove(found)

    async def _remove(self, gone: Numbered) -> None:
        del self.objects[gone.id]
        if isinstance(gone, IoasObject):
            await gone.ioas.close()
            self.iommu.ioases.remove(gone.ioas)
        elif isinstance(gone, Hwpt):
            await gone.of.ioas.remove_domain(gone.domain)
            gone.of.users -= 1

    # Address spaces and page tables

    def alloc_ioas(self) -> IoasObject:
        """IOMMU_IOAS_ALLOC."""
        new = IoasObject(self.iommu.new_ioas())
        self.add(new)
        return new

    async def alloc_hwpt(self, of: IoasObject, access: Access = Access.SHARED, auto: bool = False) -> Hwpt:
        """A new page table that shows an address space: T=0 of shared, T=1 of private pages.

        Raises: as Ioas.add_domain; ENOMEM `iommu.nomem`.
        """
        if self.iommu.scheduler.fails("hwpt: allocate"):
            raise Refusal(errno.ENOMEM, "iommu.nomem", ioas=of.id)
        hwpt = Hwpt(of, self.iommu.new_domain(access), auto)
        of.users += 1
        try:
            await of.ioas.add_domain(hwpt.domain)
        except OSError:
            of.users -= 1
            raise
        self.add(hwpt)
        return hwpt

    # Devices

    def bind(self, device: DmaDevice) -> BoundDevice:
        """VFIO_DEVICE_BIND_IOMMUFD. Raises: Refusal EINVAL `vfio.bound`."""
        if device.bound is not None:
            raise Refusal(errno.EINVAL, "vfio.bound", device=device.number)
        device.bound = self
        self.references.get()
        bound = BoundDevice(self, device)
        self.add(bound)
        return bound

    async def unbind(self, bound: BoundDevice) -> None:
        """The driver lets go of the device: it is detached first."""
        await self.detach(bound)
        bound.users -= 1
        del self.objects[bound.id]
        bound.device.bound = None
        await self.put()

    async def attach(self, bound: BoundDevice, number: int) -> int:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT: to a page table, or to an address space, which gets one of its own for this.
        A device that is attached changes over in one step. The number of the page table.

        Raises: Refusal ENOENT `iommufd.no_object`; EINVAL `iommufd.not_a_pt`; as alloc_hwpt. Then it stays where it is.
        """
        async with bound.device.lock:
            found = self.find(number, Numbered)
            if isinstance(found, IoasObject):
                hwpt = await self._auto_hwpt(found)
            elif isinstance(found, Hwpt):
                hwpt = found
            else:
                raise Refusal(errno.EINVAL, "iommufd.not_a_pt", id=number)
            former, bound.hwpt = bound.hwpt, hwpt
            hwpt.users += 1
            bound.device.attachment = Attachment(hwpt.of.ioas, hwpt.domain)
            self._trace(bound.device, hwpt.domain.number)
            if former is not None:
                await self._leave(former)
            return hwpt.id

    async def detach(self, bound: BoundDevice) -> None:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT. Whoever is attached to nothing does no DMA. Idempotent."""
        async with bound.device.lock:
            former, bound.hwpt = bound.hwpt, None
            bound.device.attachment = None
            if former is not None:
                self._trace(bound.device, 0)
                await self._leave(former)

    async def _auto_hwpt(self, of: IoasObject) -> Hwpt:
        """Source: iommufd_device_auto_get_domain: any automatic page table of the address space will do."""
        for found in self.objects.values():
            if isinstance(found, Hwpt) and found.of is of and found.auto and found.users:
                return found
        return await self.alloc_hwpt(of, auto=True)

    async def _leave(self, hwpt: Hwpt) -> None:
        hwpt.users -= 1
        if hwpt.auto and not hwpt.users:
            await self._remove(hwpt)

    def _trace(self, device: DmaDevice, domain: int) -> None:
        tracer = self.iommu.tracer
        if tracer.enabled:
            tracer.emit(event.IommuAttach(device.number, domain))

    # Life

    def get(self) -> None:
        self.references.get()

    async def put(self) -> None:
        """One holder less; with the last everything goes, what uses first. Source: iommufd_fops_release."""
        if self.iommu.scheduler.current is not None:
            self.iommu.scheduler.current.might_lock(LockClass.DEVICE_LOCK)
        if not self.references.put():
            return
        for kind in (Hwpt, IoasObject):
            for gone in [each for each in self.objects.values() if isinstance(each, kind)]:
                await self._remove(gone)
        assert not self.objects, "L3: objects left after the last close"


class Iommu:
    """The IOMMU of one host, and its devices: what every open /dev/iommu works on. `orders` are those of its leaves.

    `rules_of` tells from the owner of memory what the hardware asks of DMA to it; without, as of memory that nothing
    protects.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tracer: Tracer,
        orders: Sequence[int] = ORDERS,
        rules_of: RulesOf = lambda owner: None,
    ) -> None:
        self.scheduler = scheduler
        self.tracer = tracer
        self.orders = orders
        self.rules_of = rules_of
        self.ioases: list[Ioas] = []
        self.devices: list[DmaDevice] = []
        self._ioases_made = 0
        self._domains_made = 0

    def open(self) -> Iommufd:
        """open("/dev/iommu")."""
        return Iommufd(self)

    def new_device(self, page_requests: bool = True) -> DmaDevice:
        """Plug a device in. `page_requests`: it can ask for pages that it finds not mapped."""
        device = DmaDevice(self.scheduler, self.tracer, len(self.devices) + 1, page_requests)
        self.devices.append(device)
        return device

    def new_ioas(self) -> Ioas:
        self._ioases_made += 1
        ioas = Ioas(self.scheduler, self.tracer, self._ioases_made, self.orders, self.rules_of)
        self.ioases.append(ioas)
        return ioas

    def new_domain(self, access: Access) -> Domain:
        self._domains_made += 1
        return Domain(self.scheduler, self.tracer, self._domains_made, access, self.orders)

    def check(self) -> None:
        """At a quiet moment."""
        for ioas in self.ioases:
            ioas.check()
