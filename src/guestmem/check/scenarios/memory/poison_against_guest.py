"""The memory of a page goes bad under a guest."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(sometimes={"guest: ok", "guest: fault.poisoned", "poison: ok"})
def poison_against_guest(m: Machine) -> None:
    """The guest loses the page and gets EHWPOISON; the page goes to nobody (S19)."""
    gmem = m.gmem()
    gmem.mmap()[0] = 1
    m.actor("guest", m.guest(Store(0, 1)))
    m.actor("poison", m.poison(gmem))
