"""DMA against the unmapping of its range, a part of what was mapped."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"device: read 0x07", "device: dma.unmapped", "vmm: ok", "vmm: iommu.not_mapped"})
def dma_against_unmap(m: Machine) -> None:
    """A part of a guest_memfd's mapping can go, and what a device asks for too late does not come."""
    gmem = m.gmem(pages=2)
    gmem.mmap()[0] = 7
    dma = Dma(m)
    dma.map(gmem, follow=True)
    m.actor("device", dma.read(), dma.read(page=1))
    m.actor("vmm", dma.unmap(), dma.unmap())
