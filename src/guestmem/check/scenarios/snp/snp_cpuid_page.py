"""The page of CPUID values, which firmware corrects: from memory that may be written to, and that may not."""

import struct

from guestmem.check.invariants import Violation
from guestmem.check.machine import Machine
from guestmem.check.protected import update
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import VmType

CPUID = 6
VMX = 0x20


@scenario(sometimes={"vmm: launch.update", "vmm: ok", "other: user.page", "host: ok"})
def snp_cpuid_page(m: Machine) -> None:
    """What firmware would accept is written to the source, if that may be written to, and taken the second time."""
    vm = m.vm(VmType.SNP)
    vm.launch.start()
    m.gmem(2, init_shared=False)
    table = struct.pack("<IIQIIQQIIIIQ", 1, 0, 0, 1, 0, 0, 0, 0, 0, VMX, 0, 0)
    sources = vm.create_guest_memfd(2 * PAGE_SIZE, mmap=True, init_shared=True)
    view = sources.mmap()
    for page in range(2):
        view[page * PAGE_SIZE : page * PAGE_SIZE + len(table)] = table
    readonly = m.run(m.process.mmap(sources.fd, PAGE_SIZE, PAGE_SIZE, prot=1))
    m.actor("vmm", update(vm, view.hva, 0, CPUID), update(vm, view.hva, 0, CPUID))
    m.actor("other", update(vm, readonly, PAGE_SIZE, CPUID))

    async def look() -> None:
        if await m.process.mm.read(view.hva + PAGE_SIZE, len(table)) != table:
            raise Violation("S11", "memory that was given for reading was written to")

    m.actor("host", look())
