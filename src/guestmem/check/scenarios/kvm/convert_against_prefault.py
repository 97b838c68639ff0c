"""Pre-fault of a page that is being converted."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.memory import Access


@scenario(sometimes={"prefault: ok", "convert: ok"})
def convert_against_prefault(m: Machine) -> None:
    """What pre-fault maps is of the access that the page has, or void."""
    gmem = m.gmem()
    m.actor("prefault", m.pre_fault())
    m.actor("convert", m.convert(gmem, Access.PRIVATE))
