"""Two designs of device assignment for a confidential guest, side by side.

Today a VMM has a RamDiscardManager (QEMU's name): whatever makes a page private, or discards it, tells listeners, and
the listener of VFIO unmaps the page from the IOMMU, which holds a pin on it. The kernel cannot see whether that
happens, nor in which order. With notifications guest_memfd tells the IOMMU itself.

The VMM here has a bug that real ones have had: one way to discard (the balloon's) does not go through the manager. With
pins the device then works on a page that the memory no longer has. With notifications there is no such page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from guestmem import Access, DmaFault, Host, Refusal, VmType
from guestmem.host import Gmem
from guestmem.iommu.script import DeviceHandle, IoasHandle
from guestmem.userspace import View

PAGE = 4096
SIZE = 8 * PAGE
IOVA = 1 << 30


class RamDiscardListener(Protocol):
    """Who must know which parts of memory are there for devices."""

    def populated(self, offset: int, size: int) -> None: ...

    def discarded(self, offset: int, size: int) -> None: ...


class RamDiscardManager:
    """Which pages of a guest_memfd devices may use, page by page, and who is told. Discarding tells before, populating
    after: a listener that pins could not do it the other way round."""

    def __init__(self, gmem: Gmem) -> None:
        self.gmem = gmem
        self.listeners: list[RamDiscardListener] = []

    def convert(self, offset: int, size: int, to: Access) -> None:
        """What the guest asks for with a hypercall. Raises: Refusal, and then listeners and memory are as before."""
        if to is Access.PRIVATE:
            self._tell("discarded", offset, size)
        try:
            self.gmem.convert(offset, size, to)
        except Refusal:
            if to is Access.PRIVATE:
                self._tell("populated", offset, size)
            raise
        if to is Access.SHARED:
            self._tell("populated", offset, size)

    def _tell(self, what: str, offset: int, size: int) -> None:
        for listener in self.listeners:
            getattr(listener, what)(offset, size)


class PinningListener:
    """VFIO's listener of today: maps each page that appears, at the granularity at which it will unmap."""

    def __init__(self, space: IoasHandle, view: View) -> None:
        self.space = space
        self.view = view

    def populated(self, offset: int, size: int) -> None:
        for page in range(offset, offset + size, PAGE):
            self.space.map_pinned(self.view.hva + page, PAGE, iova=IOVA + page)

    def discarded(self, offset: int, size: int) -> None:
        self.space.unmap(IOVA + offset, size)


def run(name: str, set_up: Callable[[RamDiscardManager, IoasHandle, View], None]) -> None:
    """The same guest's life on either design."""
    with Host() as host:
        gmem = host.create_vm(VmType.SW_PROTECTED).create_guest_memfd(SIZE, mmap=True, init_shared=True)
        view = gmem.mmap()
        iommu = host.open_iommu()
        space = iommu.alloc_ioas()
        device = iommu.bind(host.new_dma_device())
        device.attach(space)
        manager = RamDiscardManager(gmem)
        set_up(manager, space, view)
        view[0:3] = b"old"
        print(f"{name}:")
        print("  the device reads", dma(device, 0))
        print("  convert, the manager's way:", attempt(lambda: manager.convert(0, PAGE, Access.PRIVATE)))
        print("  the device reads", dma(device, 0))
        manager.convert(0, PAGE, Access.SHARED)
        print("  convert past the manager:  ", attempt(lambda: gmem.convert(0, PAGE, Access.PRIVATE)))
        if gmem.accesses()[0][2] is Access.PRIVATE:
            gmem.convert(0, PAGE, Access.SHARED)
        gmem.punch_hole(0, PAGE)  # the balloon, past the manager too
        view[0:3] = b"new"
        print("  after the balloon, memory has", view[0:3], "and the device reads", dma(device, 0))


def dma(device: DeviceHandle, offset: int) -> bytes | str:
    try:
        return device.read(IOVA + offset, 3)
    except DmaFault as fault:
        return f"nothing: {fault.refusal.rule}"


def attempt(call: Callable[[], None]) -> str:
    try:
        call()
    except Refusal as refusal:
        return f"refused, {refusal.rule}"
    return "done"


def with_pins(manager: RamDiscardManager, space: IoasHandle, view: View) -> None:
    """A listener keeps IOMMU and memory in step, as well as the VMM does."""
    listener = PinningListener(space, view)
    manager.listeners.append(listener)
    listener.populated(0, SIZE)


def with_notifications(manager: RamDiscardManager, space: IoasHandle, view: View) -> None:
    """One mapping, made once. Nobody listens in the VMM."""
    space.map_gmem(manager.gmem.file, 0, SIZE, iova=IOVA, follow=True)


if __name__ == "__main__":
    run("pins and a discard manager", with_pins)
    run("notifications", with_notifications)
