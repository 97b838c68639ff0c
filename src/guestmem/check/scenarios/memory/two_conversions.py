"""Two threads of a VMM convert overlapping ranges in opposite directions."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"one: ok", "other: ok"})
def two_conversions(m: Machine) -> None:
    """One after the other: each page ends with the access of whoever came last."""
    gmem = m.gmem(pages=2)
    m.actor("one", m.convert(gmem, Access.PRIVATE, pages=2))
    m.actor("other", m.convert(gmem, Access.PRIVATE, page=1), m.convert(gmem, Access.SHARED, page=1))
