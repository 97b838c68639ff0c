"""A page after its hole."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"vmm: ok", "vmm: read 0x00"}, never={"vmm: read 0x07", "vmm: read 0xfa"})
def hole_reads_zero(m: Machine) -> None:
    """A punched page comes back as zeros: not its old bytes, not the next owner's (S12)."""
    gmem = m.gmem(pages=2)
    view = gmem.mmap()
    view[0] = 7
    m.actor("vmm", m.remove(view), m.read(view))
    m.actor("guest", m.guest(Store(PAGE_SIZE, 7)))
