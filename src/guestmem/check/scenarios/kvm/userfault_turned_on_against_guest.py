"""A slot is given a Userfault bitmap while a guest uses it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(
    sometimes={"guest: ok 0x00", "guest: fault.userfault", "restore: fault.userfault"},
    never={"restore: ok 0x00"},
)
def userfault_turned_on_against_guest(m: Machine) -> None:
    """Once the call is over, no guest reaches a page that has yet to be brought."""
    gmem, missing = m.gmem(), m.anonymous(8)
    missing.write(0, b"\1")
    m.actor("guest", m.guest(Load(0)))
    m.actor("restore", m.bind(gmem, 0, 0, missing=missing), m.guest(Load(0)))
