"""DMA against the end of its memory: VM and file are closed while they are mapped."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"device: ok", "device: iommu.revoked", "close: ok", "vmm: ok"})
def dma_against_last_close(m: Machine) -> None:
    """A mapping keeps no memory: it is revoked, and can still be unmapped."""
    gmem = m.gmem()
    gmem.allocate(0, 4096)
    dma = Dma(m)
    dma.map(gmem)
    m.actor("device", dma.write(b"d"))
    m.actor("close", m.close_fd(gmem.fd))
    m.actor("vmm", dma.unmap())
