"""MADV_DONTNEED of a mapping whose pages a guest uses."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x07", "discard: ok", "host: read 0x07"}, never={"guest: ok 0x00"})
def discard_against_guest(m: Machine) -> None:
    """Entries go, bytes stay: the file is shared memory."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 7
    m.actor("guest", m.guest(Load(0)))
    m.actor("discard", m.discard(view))
    m.actor("host", m.read(view))
