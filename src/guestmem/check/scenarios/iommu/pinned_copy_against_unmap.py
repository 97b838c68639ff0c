"""Pinned memory in two address spaces; one is unmapped while a device works in the other."""

from guestmem.check.dma import BASE, Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario


@scenario(sometimes={"device: read 0x07", "vmm: ok", "other: ok"})
def pinned_copy_against_unmap(m: Machine) -> None:
    """Each page is pinned until the last that shows it is gone, and not longer."""
    gmem = m.gmem(pages=3)
    view = gmem.mmap()
    view.write(0x1000, b"\x07")
    dma = Dma(m)
    dma.pin(view, pages=3)
    second = dma.iommu.alloc_ioas()
    other = dma.plug(attach=False)
    other.attach(second)
    dma.space.copy_to(second, BASE + 0x1000, 0x1000, to=BASE)
    m.actor("device", dma.read(device=other))
    m.actor("vmm", dma.unmap(pages=3))
    m.actor("other", m.punch(gmem, page=1))
