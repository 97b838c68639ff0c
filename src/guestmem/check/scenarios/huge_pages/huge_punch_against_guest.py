"""A hole over a split huge page, against a guest that uses it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE, Access


@scenario(sometimes={"guest: ok 0x02", "guest: ok 0x00", "punch: ok"}, failures=1)
def huge_punch_against_guest(m: Machine) -> None:
    """It is merged, freed and reserved again; what the guest touches next is a new one."""
    gmem = m.gmem(pages=4, init_shared=False, order=2)
    m.run(m.guest(Store(0, 1)))
    gmem.convert(PAGE_SIZE, PAGE_SIZE, Access.SHARED)
    m.actor("guest", m.guest(Store(0, 2), Load(0)))
    m.actor("punch", m.punch(gmem, pages=4))
