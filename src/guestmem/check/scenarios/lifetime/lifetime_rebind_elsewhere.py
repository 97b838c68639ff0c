"""A memslot is deleted and its memory bound at another guest address."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: ok 0xff"})
def lifetime_rebind_elsewhere(m: Machine) -> None:
    """Slot deleted, bound at another address."""
    gmem = used_gmem(m)
    m.actor("vmm", m.delete_slot(), m.bind(gmem, 1, 1 << 20))
    m.actor("guest", m.guest(Load(1 << 20)))
