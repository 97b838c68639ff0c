"""A file is mapped while its last descriptor is closed."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"mmap: ok", "mmap: fd.not_open", "close: ok"})
def mmap_against_last_close(m: Machine) -> None:
    """The call holds the file from the descriptor on (S6)."""
    gmem = m.gmem()
    m.actor("mmap", m.process.mmap(gmem.fd, PAGE_SIZE))
    m.actor("close", m.close_fd(gmem.fd))
