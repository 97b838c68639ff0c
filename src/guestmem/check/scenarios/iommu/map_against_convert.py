"""A file is mapped for DMA while it is converted."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"map: ok", "map: iommu.access", "convert: ok", "device: read 0x00", "device: dma.unmapped"})
def map_against_convert(m: Machine) -> None:
    """Mapped before or after: a page that is private by then is refused, or taken out again."""
    gmem = m.gmem()
    dma = Dma(m)
    m.actor("map", dma.map_file(gmem))
    m.actor("convert", m.convert(gmem, Access.PRIVATE), m.convert(gmem, Access.SHARED))
    m.actor("device", dma.read())
