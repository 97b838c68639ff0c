"""A memslot is deleted and made again at the same guest address."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: ok 0xff"})
def lifetime_rebind(m: Machine) -> None:
    """Slot deleted, bound again at the same address."""
    gmem = used_gmem(m)
    m.actor("vmm", m.delete_slot(), m.bind(gmem, 1, 0))
    m.actor("guest", m.guest(Load(0)))
