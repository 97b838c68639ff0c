"""DMA against detaching, and attaching again."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"device: read 0x07", "device: dma.not_attached", "vmm: ok", "convert: ok"})
def dma_against_detach(m: Machine) -> None:
    """The page table is made, filled and taken away while the file is converted."""
    gmem = m.gmem()
    gmem.mmap()[0] = 7
    dma = Dma(m)
    dma.map(gmem)
    m.actor("device", dma.read())
    m.actor("vmm", dma.detach(), dma.attach())
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
