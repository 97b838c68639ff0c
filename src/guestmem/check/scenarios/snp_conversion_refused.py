"""Two pages of an SNP guest are converted, and somebody may fail to unmap the first."""

from guestmem.check.firmware import Firmware
from guestmem.check.invariants import Violation
from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import PAGE_SIZE, Access, PageIndex, read_host
from guestmem.trace import Refusal


@scenario(sometimes={"vmm: ok", "vmm: convert.bad_page"}, failures=1)
def snp_conversion_refused(m: Machine) -> None:
    """The other page keeps the guest's bytes: giving it to the host would have made ciphertext of them (S15)."""
    gmem = launched_gmem(m, 2)
    touch = m.guest(Store(PAGE_SIZE, 7))
    m.before_start.append(lambda: m.run(touch))
    Firmware(m.scheduler, gmem.inode)

    async def vmm() -> str:
        try:
            await m.convert(gmem, Access.SHARED, pages=2)
        except Refusal as refusal:
            left = read_host(gmem.inode.backing.hva(PageIndex(1)), 1)
            if refusal.rule == "convert.bad_page" and 1 not in gmem.inode.unmap_failed and left != b"\7":
                raise Violation("S15", f"refused, and the guest's byte is {left.hex()}") from None
            return refusal.rule
        return "ok"

    m.actor("vmm", vmm())
