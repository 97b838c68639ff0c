"""Two threads of a VMM convert parts of one huge page."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import Access


@scenario(sometimes={"one: ok", "other: ok"}, failures=1)
def huge_conversions_of_two_parts(m: Machine) -> None:
    """Split once, by whoever comes first, and merged by whoever comes back last."""
    gmem = m.gmem(pages=4, init_shared=False, order=2)
    m.run(m.guest(Store(0, 1)))
    m.actor("one", m.convert(gmem, Access.SHARED), m.convert(gmem, Access.PRIVATE))
    m.actor("other", m.convert(gmem, Access.SHARED, page=1, pages=2), m.convert(gmem, Access.PRIVATE, page=1, pages=2))
