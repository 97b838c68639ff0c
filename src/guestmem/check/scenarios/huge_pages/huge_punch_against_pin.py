"""A hole over a huge page, against a pin of one of its parts."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"pin: ok", "punch: ok", "punch: punch.busy"})
def huge_punch_against_pin(m: Machine) -> None:
    """A huge page goes as a whole or not at all."""
    gmem = m.gmem(pages=4, order=2)
    view = gmem.mmap()
    view[PAGE_SIZE] = 1
    m.actor("pin", m.pin_briefly(view, page=1))
    m.actor("punch", m.punch(gmem, pages=4))
