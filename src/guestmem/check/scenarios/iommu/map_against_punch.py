"""A file is mapped for DMA while a hole is punched into it."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"map: ok", "punch: ok", "allocate: ok"})
def map_against_punch(m: Machine) -> None:
    """What was looked up before the hole is not installed after it."""
    gmem = m.gmem(pages=2)
    gmem.mmap()[0] = 7
    dma = Dma(m)
    m.actor("map", dma.map_file(gmem))
    m.actor("punch", m.punch(gmem))
    m.actor("allocate", m.allocate(gmem, page=1))
