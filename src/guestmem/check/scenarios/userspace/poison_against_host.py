"""The memory of a page goes bad under the host."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"host: ok", "host: SIGBUS", "poison: ok", "convert: ok"})
def poison_against_host(m: Machine) -> None:
    """The host gets SIGBUS, and no reference of the refused fault stays (S14, S19)."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1
    m.run(m.discard(view))
    m.actor("host", m.write(view, b"h"))
    m.actor("poison", m.poison(gmem))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
