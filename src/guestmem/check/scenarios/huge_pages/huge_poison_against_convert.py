"""The memory of a part of a huge page goes bad while it is converted."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load
from guestmem.memory import PAGE_SIZE, Access


@scenario(sometimes={"poison: ok", "convert: ok", "guest: ok 0x00", "guest: fault.mismatch"})
def huge_poison_against_convert(m: Machine) -> None:
    """A bad part keeps its huge page split, and is nobody's."""
    gmem = m.gmem(pages=4, order=2)
    view = gmem.mmap()
    view[PAGE_SIZE] = 1
    m.actor("poison", m.poison(gmem, page=1))
    m.actor("convert", m.convert(gmem, Access.PRIVATE, pages=4))
    m.actor("guest", m.guest(Load(0, private=True)))
