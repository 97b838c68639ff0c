"""A part of a huge page is converted and comes back, against a guest that has all of it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import PAGE_SIZE, Access


@scenario(sometimes={"guest: ok 0x02 0x00", "guest: fault.mismatch 0x02", "convert: ok"})
def huge_convert_against_guest(m: Machine) -> None:
    """S13: no leaf and no folio spans both accesses, whichever of the sizes the guest gets at the time."""
    gmem = m.gmem(pages=4, init_shared=False, order=2)
    m.run(m.guest(Store(0, 1), Store(3 * PAGE_SIZE, 2)))
    m.actor("guest", m.guest(Load(3 * PAGE_SIZE), Load(PAGE_SIZE, private=True)))
    m.actor("convert", m.convert(gmem, Access.SHARED, page=1), m.convert(gmem, Access.PRIVATE, page=1))
