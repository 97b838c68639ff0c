"""Two threads bind one page of a file to two slots."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"one: ok", "one: bind.overlap", "other: ok", "other: bind.overlap"})
def two_binds_of_one_page(m: Machine) -> None:
    """One of them is refused, and leaves nothing behind (S5)."""
    gmem = m.gmem(gpa=None)
    m.actor("one", m.bind(gmem, 1, 0))
    m.actor("other", m.bind(gmem, 2, 16 * PAGE_SIZE))
