"""Two devices on one page, an untrusted and a trusted one, against conversion there and back."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(
    sometimes={"t=0: read 0x07", "t=0: fault.access", "t=1: read 0x07", "t=1: fault.access", "convert: ok"},
    never={"t=0: read 0x00", "t=1: read 0x00"},
)
def trusted_dma_against_convert(m: Machine) -> None:
    """At no time both reach it: each finds its own kind of page, or faults."""
    gmem = m.gmem()
    gmem.mmap()[0] = 7
    dma = Dma(m)
    trusted = dma.plug(trusted=True)
    dma.map(gmem)
    m.actor("t=0", dma.read())
    m.actor("t=1", dma.read(device=trusted))
    m.actor("convert", m.convert(gmem, Access.PRIVATE), m.convert(gmem, Access.SHARED))
