"""A conversion of three pages, one of which is pinned."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"pin: ok", "convert: convert.busy", "convert: ok"}, failures=1)
def convert_range_with_one_pin(m: Machine) -> None:
    """All of the range or nothing (S15): no page has changed when the call says busy."""
    gmem = m.gmem(pages=3)
    view = gmem.mmap()
    view[0] = 1
    m.actor("pin", m.pin(view, page=1))
    m.actor("convert", m.convert(gmem, Access.PRIVATE, pages=3))
