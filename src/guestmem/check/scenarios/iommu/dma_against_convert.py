"""DMA against conversion there and back, by a device that asks for pages."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"device: read 0x07", "device: ok", "device: fault.access", "convert: ok"})
def dma_against_convert(m: Machine) -> None:
    """A DMA moves the right bytes or faults; the conversion waits for nobody."""
    gmem = m.gmem()
    gmem.mmap()[0] = 7
    dma = Dma(m)
    dma.map(gmem)
    m.actor("device", dma.read(), dma.write(b"\7"))
    m.actor("convert", m.convert(gmem, Access.PRIVATE), m.convert(gmem, Access.SHARED))
