"""The same discard, where the provider tells the IOMMU."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"after: read 0x09", "before: read 0x07"}, never={"after: read 0x07"})
def discard_with_notifications(m: Machine) -> None:
    """No stale page: once the hole is there, no DMA reads what was before it, and no VMM has to unmap anything."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 7
    dma = Dma(m)
    dma.map(gmem)

    m.actor("before", dma.read())
    m.actor("after", m.punch(gmem), m.write(view, b"\x09"), dma.read())
