"""A hole and a conversion of one page, under a guest that has it mapped."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import Access


@scenario(sometimes={"punch: ok", "convert: ok", "guest: ok 0x07 0x00", "guest: ok 0x07 0x07"})
def convert_against_punch(m: Machine) -> None:
    """The guest never keeps a mapping of the page that left, or of the access that changed."""
    gmem = m.gmem()
    gmem.mmap()[0] = 7
    m.actor("guest", m.guest(Load(0), Load(0)))
    m.actor("punch", m.punch(gmem))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
