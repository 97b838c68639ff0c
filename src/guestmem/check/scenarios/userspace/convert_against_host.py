"""A host store against the conversion of its page."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"host: ok", "host: SIGBUS", "convert: ok"})
def convert_against_host(m: Machine) -> None:
    """The store lands before the page turns private, or the host gets SIGBUS."""
    gmem = m.gmem()
    m.actor("host", m.write(gmem.mmap(), b"h"))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
