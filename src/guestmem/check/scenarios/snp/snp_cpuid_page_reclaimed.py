"""The page of CPUID values that firmware corrects, in memory that is reclaimed meanwhile."""

import struct

from guestmem.check.invariants import Violation
from guestmem.check.machine import Machine
from guestmem.check.protected import update
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import VmType

CPUID = 6
VMX = 0x20


@scenario(sometimes={"vmm: launch.update", "vmm: ok", "kswapd: freed", "kswapd: kept"})
def snp_cpuid_page_reclaimed(m: Machine) -> None:
    """The VMM finds what firmware would accept, however often its page was saved and freed."""
    vm = m.vm(VmType.SNP)
    vm.launch.start()
    m.gmem(init_shared=False)
    table = struct.pack("<IIQIIQQIIIIQ", 1, 0, 0, 1, 0, 0, 0, 0, 0, VMX, 0, 0)
    view = m.anonymous(PAGE_SIZE)
    view[0 : len(table)] = table
    corrected = table.replace(struct.pack("<I", VMX), bytes(4))

    async def look() -> None:
        if await m.process.mm.read(view.hva, len(table)) != corrected:
            raise Violation("S12", "the VMM reads its CPUID page as it was before firmware corrected it")

    m.actor("vmm", update(vm, view.hva, 0, CPUID), look(), update(vm, view.hva, 0, CPUID))
    m.actor("kswapd", m.reclaim(view), m.reclaim(view))
