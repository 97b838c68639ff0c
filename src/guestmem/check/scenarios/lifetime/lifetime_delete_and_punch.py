"""A memslot is deleted, and a hole made where it was."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: ok 0xff"})
def lifetime_delete_and_punch(m: Machine) -> None:
    """Slot deleted, then a hole."""
    gmem = used_gmem(m)
    m.actor("vmm", m.delete_slot(), m.punch(gmem))
    m.actor("guest", m.guest(Load(0)))
