"""A split that finds no memory for its struct pages, against a guest that has the huge page."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import Access


@scenario(sometimes={"convert: ok", "convert: split.vmemmap", "convert: convert.nomem", "guest: ok 0x01"}, failures=1)
def huge_split_without_memory(m: Machine) -> None:
    """S15: refused before anybody was told; the huge page is as it was."""
    gmem = m.gmem(pages=4, init_shared=False, order=2)
    m.run(m.guest(Store(0, 1)))
    m.actor("convert", m.convert(gmem, Access.SHARED, page=3))
    m.actor("guest", m.guest(Load(0)))
