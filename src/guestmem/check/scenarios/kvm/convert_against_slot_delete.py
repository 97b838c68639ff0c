"""A conversion while the memslot of the page goes."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Store
from guestmem.memory import Access


@scenario(sometimes={"convert: ok", "delete: ok"})
def convert_against_slot_delete(m: Machine) -> None:
    """The window that the conversion opens is closed, whether its slot is still there or not (S4)."""
    gmem = m.gmem()
    m.run(m.guest(Store(0, 1)))
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
    m.actor("delete", m.delete_slot())
