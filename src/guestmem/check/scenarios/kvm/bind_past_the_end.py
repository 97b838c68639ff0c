"""A slot whose offset and size wrap as a signed number."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.kvm import KVM_MEM_GUEST_MEMFD
from guestmem.uapi.structs import UserspaceMemoryRegion2


@scenario(sometimes={"bind: bind.past_end"}, never={"bind: ok"})
def bind_past_the_end(m: Machine) -> None:
    """No binding reaches beyond its file, however its end is computed (S5, S16)."""
    gmem = m.gmem(gpa=None)
    end = (1 << 63) - PAGE_SIZE
    region = UserspaceMemoryRegion2(1, KVM_MEM_GUEST_MEMFD, 0, PAGE_SIZE, 0, end, gmem.fd)
    m.actor("bind", m.set_region(region))
    m.actor("guest", m.guest(Load(0)))
