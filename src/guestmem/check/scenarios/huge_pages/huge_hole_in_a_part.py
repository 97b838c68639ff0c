"""A hole over a part of a huge page, against guest and host."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE


@scenario(sometimes={"guest: ok 0x01", "guest: ok 0x00", "punch: ok"})
def huge_hole_in_a_part(m: Machine) -> None:
    """The part is zeroed and stays; nobody is left with a mapping from before."""
    gmem = m.gmem(pages=4, init_shared=False, order=2)
    m.run(m.guest(Store(PAGE_SIZE, 1)))
    m.actor("guest", m.guest(Load(PAGE_SIZE)))
    m.actor("punch", m.punch(gmem, page=1))
