"""Two vCPUs fault one page while the host allocates it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store


@scenario(sometimes={"first: ok", "second: ok", "host: ok"})
def two_vcpus_touch_one_page(m: Machine) -> None:
    """The page is allocated once; whoever loses the race gives its own back (S14)."""
    gmem = m.gmem()
    m.actor("first", m.guest(Store(0, 1)))
    m.actor("second", m.guest(Store(0, 2)))
    m.actor("host", m.allocate(gmem))
