"""The discard design: a VMM frees memory, and unmaps it from the IOMMU when its listener comes to it."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"device: read 0x07", "device: read 0x09", "vmm: ok", "guest: ok"})
def discard_with_pins(m: Machine) -> None:
    """The stale IOMMU page: between hole and unmapping the device reads 7, which the memory no longer has."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 7
    dma = Dma(m)
    dma.pin(view)
    m.actor("vmm", m.punch(gmem), m.write(view, b"\x09"), dma.unmap(), dma.map_memory(view))
    m.actor("device", dma.read())
    m.actor("guest", m.allocate(gmem))
