"""Populate with source address 0, by mistake."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"populate: user.page"}, never={"populate: ok"})
def populate_from_nowhere(m: Machine) -> None:
    """Address 0 is an address like others and unmapped; it does not mean "in place" (S16)."""
    m.gmem(init_shared=False)
    m.actor("populate", m.populate_from(0))
    m.actor("guest", m.guest(Load(0)))
