"""A guest_memfd slot that is also read-only."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY
from guestmem.uapi.structs import UserspaceMemoryRegion2


@scenario(sometimes={"bind: region.flags"}, never={"bind: ok"})
def readonly_gmem_slot(m: Machine) -> None:
    """Read-only means emulated writes, which private memory cannot have (S16)."""
    gmem = m.gmem(gpa=None)
    flags = KVM_MEM_GUEST_MEMFD | KVM_MEM_READONLY
    m.actor("bind", m.set_region(UserspaceMemoryRegion2(1, flags, 0, PAGE_SIZE, 0, 0, gmem.fd)))
    m.actor("guest", m.guest(Store(0, 1)))
