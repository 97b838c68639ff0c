"""Two vCPUs touch two parts of a new huge page, the only one that there is."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"one: ok", "other: ok"}, never={"one: pool.no_huge_page", "other: pool.no_huge_page"})
def huge_first_touch_of_two_parts(m: Machine) -> None:
    """One of them allocates it; the reservation is for one page, so neither may take a second."""
    m.gmem(pages=4, init_shared=False, order=2)
    m.actor("one", m.guest(Store(0, 1)))
    m.actor("other", m.guest(Store(3 * PAGE_SIZE, 2)))
