"""The process of a device ends in the middle of its DMA, and its VMM closes /dev/iommu."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"device: ok", "device: dma.not_attached", "dies: ok", "vmm: ok"})
def device_dies(m: Machine) -> None:
    """Whoever lets go last takes page table and address space with it (L3)."""
    gmem = m.gmem()
    dma = Dma(m)
    dma.map(gmem, follow=True)
    m.actor("device", dma.write(b"d"))
    m.actor("dies", dma.die())
    m.actor("vmm", m.close_fd(dma.iommu.fd))
