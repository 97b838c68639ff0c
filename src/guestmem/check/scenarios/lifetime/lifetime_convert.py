"""A page becomes shared while the guest uses it."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import Access


@scenario(sometimes={"guest: ok 0x07"})
def lifetime_convert(m: Machine) -> None:
    """Page converted to shared."""
    gmem = used_gmem(m)
    m.actor("vmm", m.convert(gmem, Access.SHARED))
    m.actor("guest", m.guest(Load(0)))
