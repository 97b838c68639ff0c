"""A guest waits for a page that the VMM brings."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "guest: fault.userfault"}, never={"guest: ok 0x00"})
def userfault_page_is_brought(m: Machine) -> None:
    """The bytes are there before the bit is clear, so the guest reads them or faults."""
    gmem, missing = m.gmem(gpa=None), m.anonymous(8)
    missing.write(0, b"\1")
    m.run(m.bind(gmem, 0, 0, missing=missing))
    m.actor("guest", m.guest(Load(0)))
    m.actor("vmm", m.write(gmem.mmap(), b"\7"), m.write(missing, b"\0"))
