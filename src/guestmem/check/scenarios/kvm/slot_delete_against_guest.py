"""A memslot goes while a guest uses it."""

from guestmem.check.machine import Machine
from guestmem.check.scenario import scenario
from guestmem.cpu.scripted import Load


@scenario(sometimes={"guest: ok 0x00", "guest: ok 0xff", "delete: ok"})
def slot_delete_against_guest(m: Machine) -> None:
    """No fault that found the slot maps anything once it is gone (S3, L2, L4)."""
    m.gmem()
    m.actor("guest", m.guest(Load(0)))
    m.actor("delete", m.delete_slot())
