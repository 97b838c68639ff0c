"""Holes, one after another, under a guest."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load, Store


@scenario(sometimes={"guest: ok 0x00 0x01", "guest: ok 0x00 0x00", "punch: ok"})
def punch_against_guest(m: Machine) -> None:
    """A look-up that a hole has overtaken is void, though the page that comes next has the same number (S3)."""
    gmem = m.gmem()
    m.actor("guest", m.guest(Load(0), Store(0, 1), Load(0)))
    m.actor("punch", m.punch(gmem), m.punch(gmem))
