"""The last descriptor of a file is closed while a memslot has it."""

from guestmem.check.machine import Machine
from guestmem.check.protected import used_gmem
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: fault.file_gone"})
def lifetime_close_bound(m: Machine) -> None:
    """Last descriptor closed with a slot bound."""
    gmem = used_gmem(m)
    m.actor("vmm", m.close_fd(gmem.fd))
    m.actor("guest", m.guest(Load(0)))
