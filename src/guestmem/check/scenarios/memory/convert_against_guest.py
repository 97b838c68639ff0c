"""A guest store against conversion there and back."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store
from guestmem.memory import Access


@scenario(sometimes={"guest: ok 0x00", "convert: ok"})
def convert_against_guest(m: Machine) -> None:
    """A software-protected guest's access follows the state of the page, whatever that is by then."""
    gmem = m.gmem()
    m.actor("guest", m.guest(Load(0), Store(0, 1)))
    m.actor("convert", m.convert(gmem, Access.PRIVATE), m.convert(gmem, Access.SHARED))
