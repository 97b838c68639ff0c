"""An update of flags that would take the guest_memfd off a slot."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE
from guestmem.uapi.structs import UserspaceMemoryRegion2


@scenario(sometimes={"toggle: region.fixed_flags", "close: ok"}, never={"toggle: ok"})
def slot_flags_of_gmem(m: Machine) -> None:
    """A guest_memfd slot is immutable; otherwise its binding would outlive it (S5, S6)."""
    gmem = m.gmem()
    toggle = UserspaceMemoryRegion2(0, 0, 0, PAGE_SIZE)
    m.actor("toggle", m.set_region(toggle))
    m.actor("close", m.close_fd(gmem.fd))
