"""A page of an SNP guest's huge page becomes shared while two trusted devices use the ones beside it."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem, touch
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(
    failures=1,
    sometimes={
        "device: read 0x07",
        "other: read 0x07",
        "device: iommu.revoked",
        "convert: ok",
        "convert: convert.nomem",
        "convert: convert.bad_page",
    },
    never={"device: dma.unmapped", "other: dma.unmapped", "device: dma.rmp", "other: dma.rmp"},
)
def snp_dma_on_huge_page(m: Machine) -> None:
    """RMP entry and every IO leaf over it are split in one step, all or none (Q13, S13)."""
    gmem = launched_gmem(m, pages=4, order=2)
    touch(m, 0, 2)
    dma = Dma(m, trusted=True)
    other = dma.plug(trusted=True)
    m.before_start.append(lambda: dma.map(gmem))
    m.actor("device", dma.read(page=0))
    m.actor("other", dma.read(page=2, device=other))
    m.actor("convert", m.convert(gmem, Access.SHARED, page=1))
