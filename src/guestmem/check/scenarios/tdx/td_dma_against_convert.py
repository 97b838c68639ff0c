"""A TD's page is converted there and back under DMA of an untrusted device and of one of the TD's own."""

from guestmem.check.dma import Dma
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem, touch
from guestmem.check.scenario import scenario
from guestmem.memory import Access
from guestmem.uapi.kvm import VmType


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
def td_dma_against_convert(m: Machine) -> None:
    """The trusted device follows the Secure EPT, the other one never poisons a page (S1, S2, S13, MC)."""
    gmem = launched_gmem(m, vm_type=VmType.TDX)
    touch(m, 0)
    dma = Dma(m)
    trusted = dma.plug(trusted=True)
    m.before_start.append(lambda: dma.map(gmem))
    m.actor("t=0", dma.write(b"d"))
    m.actor("t=1", dma.read(device=trusted))
    m.actor("convert", m.convert(gmem, Access.SHARED), m.convert(gmem, Access.PRIVATE))
