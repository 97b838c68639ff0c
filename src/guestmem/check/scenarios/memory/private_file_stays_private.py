"""A file that was not made INIT_SHARED."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(sometimes={"host: SIGBUS", "guest: ok"}, never={"host: ok"})
def private_file_stays_private(m: Machine) -> None:
    """Its pages are born private: the host cannot touch one, mapped or not (S16)."""
    gmem = m.gmem(init_shared=False)
    m.actor("host", m.write(gmem.mmap(), b"h"))
    m.actor("guest", m.guest(Store(0, 1)))
