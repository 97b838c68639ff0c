"""The last close of a file of huge pages, against pins of two parts that come back."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"close: ok", "io: ok"})
def huge_close_against_unpin(m: Machine) -> None:
    """The huge page comes back once, with whoever is last, merged, to the pool and not to the reservation."""
    gmem = m.gmem(pages=4, gpa=None, order=2)
    view = gmem.mmap()
    view[0] = view[PAGE_SIZE] = 1
    m.actor("io", m.pin_briefly(view), m.pin_briefly(view, page=1))
    m.actor("close", m.unmap(view), m.close_fd(gmem.fd))
