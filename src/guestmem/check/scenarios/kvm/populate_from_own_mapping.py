"""Populate whose source is a mapping of the same file, against a host fault."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE, Access


@scenario(sometimes={"populate: ok", "host: ok"})
def populate_from_own_mapping(m: Machine) -> None:
    """The source is pinned before invalidate_lock is taken; the other order is a deadlock (S17, L5)."""
    gmem = m.gmem(pages=2)
    view = gmem.mmap()
    gmem.convert(0, PAGE_SIZE, Access.PRIVATE)
    m.actor("populate", m.populate_from(view.hva + PAGE_SIZE))
    m.actor("host", m.write(view, b"h", page=1))
