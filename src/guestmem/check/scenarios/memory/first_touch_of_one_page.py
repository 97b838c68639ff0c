"""A guest and a host touch a new page at the same time."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x00", "guest: ok 0x68", "host: ok"})
def first_touch_of_one_page(m: Machine) -> None:
    """One page comes into the file and it is zeroed once (S12)."""
    gmem = m.gmem()
    m.actor("guest", m.guest(Load(0)))
    m.actor("host", m.write(gmem.mmap(), b"h"))
