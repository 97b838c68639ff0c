"""A memslot is deleted while a vCPU uses it; its file stays open."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store


@scenario(sometimes={"guest: ok 0x09", "guest: ok 0xff"})
def lifetime_delete_in_use(m: Machine) -> None:
    """Slot deleted while a vCPU uses it."""
    used_gmem(m)
    m.actor("vmm", m.delete_slot())
    m.actor("guest", m.guest(Store(0, 9), Load(0)))
