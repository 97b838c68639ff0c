"""The memory of a page goes bad while its file is closed for the last time."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(sometimes={"poison: ok", "poison: no page", "close: ok"})
def poison_against_last_close(m: Machine) -> None:
    """A view is not told once it has left, and it leaves only when no call is on its way (S20, L6)."""
    gmem = m.gmem()
    m.run(m.guest(Store(0, 1)))
    m.actor("poison", m.poison(gmem))
    m.actor("close", m.close_fd(gmem.fd))
