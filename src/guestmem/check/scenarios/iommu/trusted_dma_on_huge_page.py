"""A page of a huge page becomes shared while a trusted device uses the one beside it."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(
    sometimes={"device: read 0x00", "device: iommu.revoked", "convert: ok", "convert: convert.nomem"},
    never={"device: dma.unmapped"},
    failures=1,
)
def trusted_dma_on_huge_page(m: Machine) -> None:
    """The leaf is split around the page; if it cannot be, the whole area is revoked and the conversion goes on."""
    gmem = m.gmem(pages=4, init_shared=False, order=2)
    dma = Dma(m, trusted=True)
    dma.map(gmem)
    m.actor("device", dma.read(page=0), dma.read(page=3))
    m.actor("convert", m.convert(gmem, Access.SHARED, page=1))
