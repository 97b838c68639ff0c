"""The middle of a huge page of an SNP guest is converted, and PSMASH or RMPUPDATE may fail."""

from guestmem.check.machine import Machine
from guestmem.check.protected import launched_gmem, share_or_keep
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import VmType


@scenario(failures=1, sometimes={"vmm: ok", "vmm: convert.bad_page", "guest: ok 0x02"})
def snp_huge_conversion_refused(m: Machine) -> None:
    """Large entries are smashed before the first page changes hands (S13, S15)."""
    gmem = launched_gmem(m, 4, VmType.SNP, order=2)
    m.beforehand(m.guest(*(Store(page * PAGE_SIZE, page + 1) for page in range(4))))
    m.actor("vmm", share_or_keep(m, gmem, 1, 2))
    m.actor("guest", m.guest(Load(PAGE_SIZE)))
