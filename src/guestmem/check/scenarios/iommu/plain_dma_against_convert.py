"""DMA against conversion, by a device that cannot ask for pages."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"device: read 0x07", "device: dma.unmapped", "convert: ok"})
def plain_dma_against_convert(m: Machine) -> None:
    """What a conversion has taken out stays out, and the page beside it stays in."""
    gmem = m.gmem(pages=2)
    gmem.mmap()[0x1000] = 7
    dma = Dma(m, page_requests=False)
    dma.map(gmem)
    m.actor("device", dma.read(page=0), dma.read(page=1))
    m.actor("convert", m.convert(gmem, Access.PRIVATE), m.convert(gmem, Access.SHARED))
