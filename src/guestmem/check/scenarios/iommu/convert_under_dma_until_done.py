"""A VMM that repeats its conversion while a device has the page mapped."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access
from guestmem.trace import Refusal


@scenario(sometimes={"vmm: done", "device: read 0x07", "device: fault.access"}, never={"vmm: busy"})
def convert_under_dma_until_done(m: Machine) -> None:
    """The IOMMU holds no reference, so it never vetoes: the first attempt succeeds (L1)."""
    gmem = m.gmem()
    gmem.mmap()[0] = 7
    dma = Dma(m)
    dma.map(gmem, follow=True)

    async def vmm() -> str:
        while True:
            try:
                await m.convert(gmem, Access.PRIVATE)
                return "done"
            except Refusal:
                await m.scheduler.cond_resched("busy, try again")

    m.actor("vmm", vmm())
    m.actor("device", dma.read())
