"""A hole under a guest and a host that both use the page."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(sometimes={"host: ok", "punch: ok", "guest: ok"})
def punch_against_guest_and_host(m: Machine) -> None:
    """Nobody keeps a mapping of a page that left the file (S3, S10)."""
    gmem = m.gmem()
    m.actor("guest", m.guest(Store(0, 1)))
    m.actor("host", m.write(gmem.mmap(), b"h"))
    m.actor("punch", m.punch(gmem))
