"""All of a huge page becomes private, against a pin of one of its parts."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import PAGE_SIZE, Access


@scenario(sometimes={"pin: ok", "pin: user.page", "convert: ok", "convert: convert.busy"})
def huge_convert_against_pin(m: Machine) -> None:
    """The pin is of one part, the conversion of all: one of them has to lose."""
    gmem = m.gmem(pages=4, order=2)
    view = gmem.mmap()
    view[PAGE_SIZE] = 1
    m.actor("pin", m.pin_briefly(view, page=1))
    m.actor("convert", m.convert(gmem, Access.PRIVATE, pages=4))
