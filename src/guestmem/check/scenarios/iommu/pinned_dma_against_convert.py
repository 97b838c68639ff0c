"""The same with the pins of today's kernels: a VMM converts, and has to unmap first."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(
    sometimes={"vmm: convert.busy", "vmm: ok", "device: read 0x07", "device: dma.unmapped"},
    never={"device: read 0x00"},
)
def pinned_dma_against_convert(m: Machine) -> None:
    """With pins a conversion is refused until the VMM has unmapped, whatever the device does."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 7
    dma = Dma(m)
    dma.pin(view)
    m.actor("vmm", m.convert(gmem, Access.PRIVATE), dma.unmap(), m.convert(gmem, Access.PRIVATE))
    m.actor("device", dma.read())
