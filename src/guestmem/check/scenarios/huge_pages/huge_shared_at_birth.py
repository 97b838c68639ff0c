"""A new huge page is shared, or becomes private while it comes."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"host: ok", "host: SIGBUS", "convert: ok"}, failures=1)
def huge_shared_at_birth(m: Machine) -> None:
    """It comes into the file split where it is shared, and whole where it is not."""
    gmem = m.gmem(pages=4, order=2)
    view = gmem.mmap()
    m.actor("host", m.write(view, b"h", page=2))
    m.actor("convert", m.convert(gmem, Access.PRIVATE, page=2, pages=2))
