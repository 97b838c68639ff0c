"""A conversion against a long-term pin of its page."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"pin: ok", "pin: user.page", "convert: ok", "convert: convert.busy"})
def convert_against_pin(m: Machine) -> None:
    """Whoever is first wins: a pinned page is busy, a private one cannot be pinned."""
    gmem = m.gmem()
    view = gmem.mmap()
    view[0] = 1
    m.actor("pin", m.pin(view))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
