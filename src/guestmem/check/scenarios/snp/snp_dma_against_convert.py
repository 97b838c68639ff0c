"""A page of an SNP guest is converted there and back under DMA of an untrusted device and of one of the guest's own."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem, touch
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(
    failures=1,
    sometimes={
        "t=0: fault.access",
        "t=0: ok",
        "t=1: read 0x07",
        "t=1: fault.access",
        "t=1: iommu.not_guests",
        "convert: ok",
        "convert: convert.bad_page",
    },
)
def snp_dma_against_convert(m: Machine) -> None:
    """Each device reaches its own kind of page, and the RMP agrees with the leaf at every step (S1, S2, S13)."""
    gmem = launched_gmem(m)
    touch(m, 0)
    dma = Dma(m)
    trusted = dma.plug(trusted=True)
    m.before_start.append(lambda: dma.map(gmem))
    m.actor("t=0", dma.write(b"d"))
    m.actor("t=1", dma.read(device=trusted))
    m.actor("convert", m.convert(gmem, Access.SHARED), m.convert(gmem, Access.PRIVATE))
