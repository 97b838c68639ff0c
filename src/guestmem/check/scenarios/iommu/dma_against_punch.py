"""DMA against a hole, while somebody else gets the page."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"device: ok", "punch: ok", "other: ok", "other: read 0x00"}, never={"other: read 0x64"})
def dma_against_punch(m: Machine) -> None:
    """A page that was freed is the next owner's: no DMA reaches it."""
    gmem = m.gmem(pages=2)
    view = gmem.mmap()
    view[0] = 7
    dma = Dma(m)
    dma.map(gmem)
    m.actor("device", dma.write(b"d"))
    m.actor("punch", m.punch(gmem))
    m.actor("other", m.punch(gmem, page=1), m.read(view, page=1))
